"""A decoder that scores a few tokens after each row's last one, and nothing else.

Choosing between answers takes C rows of the output matrix at one position a row, not V rows at every
position: for a vocabulary of 128,000 and 100 tokens a row that is most of a small model's work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kilobayes.errors import KilobayesError
from kilobayes.host.stack import base_of

# The score of an answer that a row does not have: its probability is 0 in any precision, at any temperature
# that is fitted, and it stays a number in any precision, as derivatives need.
ABSENT = -6e4


class AnswerHead(nn.Module):
    """Scores ``(rows, C)`` of some tokens after each row's last one, of hidden states ``(rows, T, d)``."""

    def __init__(self, head: nn.Linear, tokens: Tensor) -> None:
        super().__init__()
        self.head, self.tokens = head, tokens
        self.mask: Tensor | None = None  # of the batch, as the model was called with

    def forward(self, hidden: Tensor) -> Tensor:
        at = hidden.new_full((len(hidden),), hidden.shape[1] - 1, dtype=torch.int64)
        if self.mask is not None and hidden.shape[1] == self.mask.shape[1]:
            places = torch.arange(1, self.mask.shape[1] + 1, device=self.mask.device)
            at = by_member((self.mask * places).argmax(dim=1), len(hidden))
        read = hidden[torch.arange(len(hidden), device=hidden.device), at]
        bias = None if self.head.bias is None else self.head.bias[self.tokens]
        return nn.functional.linear(read, self.head.weight[self.tokens], bias)


def by_member(values: Tensor, rows: int) -> Tensor:
    """Values of a batch's rows, for the rows of all members: they see the same."""
    return values.repeat(rows // len(values), *[1] * (values.dim() - 1))


def absent(scores: Tensor, counts: Tensor | None) -> Tensor:
    """Scores ``(rows, C)`` with all but the first ``counts[row]`` of each row at ``ABSENT``."""
    if counts is None:
        return scores
    beyond = torch.arange(scores.shape[1], device=scores.device) >= by_member(counts, len(scores))[:, None]
    return scores.masked_fill(beyond, ABSENT)


@contextmanager
def replaced(base: Any, new: nn.Module) -> Iterator[None]:
    """Within it, another module stands where a causal model's output matrix does."""
    head = base.get_output_embeddings()
    path = next(name for name, module in base.named_modules() if module is head)
    parent, _, child = path.rpartition(".")
    setattr(base.get_submodule(parent), child, new)
    try:
        yield
    finally:
        setattr(base.get_submodule(parent), child, head)


def output_matrix(base: Any) -> nn.Linear:
    """The output layer of a causal model.

    Raises:
        KilobayesError: it has none, or one that is no plain matrix.
    """
    head = base.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise KilobayesError(
            "answers are scored by rows of the output matrix",
            f"{type(base).__name__} has {'none' if head is None else f'a {type(head).__name__}'}",
            "take a causal language model whose output layer is not adapted or quantised",
        )
    return head


@contextmanager
def answers(model: nn.Module, tokens: Sequence[int]) -> Iterator[None]:
    """Within it, a causal language model's ``logits`` are ``(rows, C)``: of the given tokens, in order.

    Rows may be padded on either side. What the model does to its logits, as Gemma's cap, is done to these.
    Called with ``counts=`` ``(rows,)``, a row has only so many of the answers to choose from, the first ones;
    the scores of the others are ``ABSENT``.

    Raises:
        KilobayesError: the model has no plain output matrix.
    """
    base: Any = base_of(model)
    now = base.get_output_embeddings()
    if isinstance(now, AnswerHead) and now.tokens.tolist() == list(tokens):
        yield  # entered already: posteriors may predict while the task trains
        return
    head = output_matrix(base)
    some = AnswerHead(head, torch.tensor(list(tokens), device=head.weight.device))
    counts: list[Tensor | None] = [None]

    def note(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        some.mask, counts[0] = kwargs.get("attention_mask"), kwargs.get("counts")
        return args, {k: v for k, v in kwargs.items() if k != "counts"}

    def mask(module: nn.Module, args: tuple, output: Any) -> None:
        output.logits = absent(output.logits, counts[0])

    handles = [base.register_forward_pre_hook(note, with_kwargs=True), base.register_forward_hook(mask)]
    try:
        with replaced(base, some):
            yield
    finally:
        for handle in handles:
            handle.remove()
