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
            last = (self.mask * places).argmax(dim=1)
            at = last.repeat(len(hidden) // len(last))  # a stack's members see the same rows
        read = hidden[torch.arange(len(hidden), device=hidden.device), at]
        bias = None if self.head.bias is None else self.head.bias[self.tokens]
        return nn.functional.linear(read, self.head.weight[self.tokens], bias)


@contextmanager
def answers(model: nn.Module, tokens: Sequence[int]) -> Iterator[None]:
    """Within it, a causal language model's ``logits`` are ``(rows, C)``: of the given tokens, in order.

    Rows may be padded on either side. What the model does to its logits, as Gemma's cap, is done to these.

    Raises:
        KilobayesError: the model has no plain output matrix.
    """
    base: Any = base_of(model)
    head = base.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise KilobayesError(
            "answers are scored by rows of the output matrix",
            f"{type(base).__name__} has {'none' if head is None else f'a {type(head).__name__}'}",
            "take a causal language model whose output layer is not adapted or quantised",
        )
    path = next(name for name, module in base.named_modules() if module is head)
    parent, _, child = path.rpartition(".")
    some = AnswerHead(head, torch.tensor(list(tokens), device=head.weight.device))

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        some.mask = kwargs.get("attention_mask")

    handle = base.register_forward_pre_hook(note, with_kwargs=True)
    setattr(base.get_submodule(parent), child, some)
    try:
        yield
    finally:
        setattr(base.get_submodule(parent), child, head)
        handle.remove()
