"""A causal model's losses at the tokens that count, without scores of the whole vocabulary at every token.

The model runs up to its output matrix. Scores are computed for the tokens that have a label, some at a time,
and so are their derivatives with respect to the hidden states, in the same pass: memory is that of the hidden
states and of one chunk of scores, whatever the number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kilobayes.errors import KilobayesError
from kilobayes.host.stack import base_of

IGNORED = -100  # the label of a token that does not count, as in transformers
NUMBERS_AT_ONCE = 1 << 24  # scores of a chunk: 64 MB in float32


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The output matrix and what the model does to its scores afterwards.

    Attributes:
        weight: ``(V, d)``, frozen.
        bias: ``(V,)`` or None.
        scale: scores are multiplied by it (Cohere, Granite).
        cap: scores are ``cap tanh(score / cap)`` (Gemma 2); 0 for none.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float = 0.0

    @property
    def chunk(self) -> int:
        """Tokens at once."""
        return max(1, NUMBERS_AT_ONCE // len(self.weight))

    def scores(self, hidden: Tensor) -> Tensor:
        """Scores ``(n, V)`` in float32 of hidden states ``(n, d)``."""
        found = nn.functional.linear(hidden, self.weight, self.bias).float()
        found = found if self.scale == 1.0 else found * self.scale
        return self.cap * (found / self.cap).tanh() if self.cap else found

    def slope(self, scores: Tensor, labels: Tensor, log_total: Tensor) -> Tensor:
        """Derivative ``(n, d)`` of ``-log softmax(scores)[label]`` with respect to the hidden states."""
        steep = (scores - log_total[:, None]).exp()
        steep[torch.arange(len(labels), device=labels.device), labels] -= 1.0
        if self.cap:
            steep = steep * (1.0 - (scores / self.cap).square())
        return (steep * self.scale).to(self.weight.dtype) @ self.weight

    def nll(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """``-log softmax`` of each token's label ``(n,)`` in nats, differentiable in ``hidden``."""
        return _TokenNll.apply(hidden, labels, self)


class _TokenNll(torch.autograd.Function):
    """The derivative is taken while a chunk's scores are there; the backward only scales it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, vocabulary: Vocabulary) -> Tensor:
        wanted = hidden.requires_grad
        out = torch.empty(len(labels), device=hidden.device)
        slope = torch.empty_like(hidden) if wanted else hidden[:0]
        for first in range(0, len(labels), vocabulary.chunk):
            part = slice(first, first + vocabulary.chunk)
            scores = vocabulary.scores(hidden[part])
            total = scores.logsumexp(dim=-1)
            out[part] = total - scores.gather(-1, labels[part, None])[:, 0]
            if wanted:
                slope[part] = vocabulary.slope(scores, labels[part], total).to(slope.dtype)
        ctx.save_for_backward(slope)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * grads[0][:, None].to(slope.dtype), None, None


class HiddenHead(nn.Module):
    """Stands where the output matrix was, keeps the hidden states ``(rows, T, d)``, computes no scores."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.hidden: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """Keeps what comes; the model's own output is a column of it, which nobody reads."""
        self.hidden = hidden
        return hidden[..., :1]

    def take(self) -> Tensor:
        """The hidden states of the forward before, once.

        Raises:
            KilobayesError: there was none.
        """
        if self.hidden is None:
            raise KilobayesError("the model's output layer was not reached")
        hidden, self.hidden = self.hidden, None
        return hidden

    def row_nll(self, labels: Tensor) -> Tensor:
        """Sums ``(rows,)`` over each row's labelled tokens, in nats, of the forward before.

        Args:
            labels: ``(rows, T)`` or as many in another shape: what follows each token, or ``IGNORED``.
        """
        hidden = self.take()
        flat = labels.reshape(hidden.shape[:2])
        at = (flat != IGNORED).nonzero(as_tuple=True)
        each = self.vocabulary.nll(hidden[at], flat[at])
        return each.new_zeros(len(hidden)).index_add(0, at[0], each)


@contextmanager
def hidden_states(model: nn.Module) -> Iterator[HiddenHead]:
    """Within it, a causal language model stops before its output matrix. Inside another, it is that one.

    Raises:
        KilobayesError: the output layer is adapted, quantised or trained, or there is none.
    """
    base: Any = base_of(model)
    head = base.get_output_embeddings()
    if isinstance(head, HiddenHead):  # a posterior that looks at rows while it is trained
        yield head
        return
    if type(head) is not nn.Linear:
        found = "no such layer" if head is None else f"a {type(head).__name__}, adapted or trained"
        raise KilobayesError(
            "losses are computed beside the model, from its frozen output matrix",
            f"{type(base).__name__} has {found}",
            "take a causal language model, and leave its output layer out of --target-modules",
        )
    path = next(name for name, module in base.named_modules() if module is head)
    parent, _, child = path.rpartition(".")
    stand_in = HiddenHead(vocabulary_of(base, head))
    setattr(base.get_submodule(parent), child, stand_in)
    try:
        yield stand_in
    finally:
        setattr(base.get_submodule(parent), child, head)


def vocabulary_of(base: Any, head: nn.Linear) -> Vocabulary:
    """The output matrix, with what the configuration says is done to its scores."""
    config = base.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    cap = float(getattr(config, "final_logit_softcapping", None) or 0.0)
    return Vocabulary(head.weight, head.bias, scale, cap)


@torch.no_grad()
def check_output(model: nn.Module, ids: Tensor) -> None:
    """Refuse a model whose own scores are others than those computed here.

    Args:
        ids: a row of tokens ``(1, T)``.

    Raises:
        KilobayesError: they differ, since the model does something to them that is not known here.
    """
    own = model(input_ids=ids).logits[0].float()
    with hidden_states(model) as head:
        model(input_ids=ids)
        found = head.vocabulary.scores(head.take()[0])
    if not torch.allclose(own, found, atol=1e-3 * float(own.abs().max().clamp(min=1.0)), rtol=0):
        raise KilobayesError(
            f"{type(base_of(model)).__name__} does more to its scores than multiply by its output matrix",
            f"largest difference {float((own - found).abs().max()):.3g}",
            "take another language model",
        )
