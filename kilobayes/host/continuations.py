"""A decoder that scores given continuations, from the hidden states just before their tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kilobayes.host.answers import absent, by_member, output_matrix, replaced
from kilobayes.host.stack import base_of


class _Head(nn.Module):
    """Logits ``(rows, K, V)`` of the output matrix at some positions of each row, of ``(rows, T, d)``."""

    def __init__(self, head: nn.Linear, choices: int) -> None:
        super().__init__()
        self.head, self.choices = head, choices
        self.at = torch.empty(0, 0, dtype=torch.int64)

    def forward(self, hidden: Tensor) -> Tensor:
        at = by_member(self.at, len(hidden))
        return self.head(hidden.gather(1, at[:, :, None].expand(*at.shape, hidden.shape[2])))


@contextmanager
def continuations(model: nn.Module, choices: int) -> Iterator[None]:
    """Within it, a causal language model's ``logits`` are ``(rows, C)``: of C continuations of a row each.

    It is called with ``(rows C, T)`` ids, the C sequences of a row after each other, padded on either side,
    and with ``answer=``, of the same shape, 1 at the tokens to score; ``units=`` ``(rows C,)`` divides the
    sum of their log-probabilities in nats. With ``counts=`` ``(rows,)`` only the first so many of a row are
    there. What the model does to its logits, as Gemma's cap, is done before they are normalised.

    Raises:
        KilobayesError: the model has no plain output matrix.
    """
    base: Any = base_of(model)
    now = base.get_output_embeddings()
    if isinstance(now, _Head) and now.choices == choices:
        yield  # entered already: posteriors may predict while the task trains
        return
    some = _Head(output_matrix(base), choices)
    given: dict[str, Any] = {}
    own = ("answer", "units", "counts")

    def note(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        answer = kwargs["answer"]
        most = int(answer.sum(dim=1).max())
        places = answer.argsort(dim=1, descending=True, stable=True)[:, :most]
        some.at = (places - 1).clamp(min=0)  # what comes next is told by the position before
        given.update(
            targets=kwargs["input_ids"].gather(1, places),
            real=answer.gather(1, places),
            units=kwargs["units"],
            counts=kwargs.get("counts"),
        )
        return args, {k: v for k, v in kwargs.items() if k not in own}

    def score(module: nn.Module, args: tuple, output: Any) -> None:
        logits: Tensor = output.logits
        logs = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(dim=-1)
        targets, real, units = (by_member(given[k], len(logits)) for k in ("targets", "real", "units"))
        sums = (logs.gather(-1, targets[..., None])[..., 0] * real).sum(dim=1)
        output.logits = absent((sums / units).unflatten(0, (-1, choices)), given["counts"])

    handles = [base.register_forward_pre_hook(note, with_kwargs=True), base.register_forward_hook(score)]
    try:
        with replaced(base, some):
            yield
    finally:
        for handle in handles:
            handle.remove()
