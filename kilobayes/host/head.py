"""Classifier heads: trained whole, one copy per member."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Whole:
    """A stack of S whole linear layers: weight ``(S, o, i)`` and bias ``(S, o)`` or None."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """``(S, N, i) -> (S, N, o)``."""
        if self.bias is None:
            return torch.bmm(x, self.weight.mT)
        return torch.baddbmm(self.bias[:, None], x, self.weight.mT)


class StackedLinear(nn.Module):
    """S linear layers in the place of one; block s of the rows goes to member s.

    Keeps the names ``weight`` and ``bias``, so PEFT saves and loads it like the head it replaces.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self.installed: Whole | None = None

    @classmethod
    def repeat(cls, linear: nn.Linear, stack: int) -> StackedLinear:
        """S copies of a layer."""

        def copies(t: Tensor) -> Tensor:
            return t.detach().expand(stack, *t.shape).clone()

        return cls(copies(linear.weight), None if linear.bias is None else copies(linear.bias))

    @property
    def in_features(self) -> int:
        return self.weight.shape[-1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[-2]

    def forward(self, x: Tensor) -> Tensor:
        whole = self.installed or Whole(self.weight, self.bias)
        stack = whole.weight.shape[0]
        weight = whole.weight.to(x.dtype)
        bias = None if whole.bias is None else whole.bias.to(x.dtype)
        out = Whole(weight, bias)(blocks(x, stack).flatten(1, -2))
        return out.reshape(*x.shape[:-1], out.shape[-1])

    def single(self) -> nn.Linear:
        """The plain layer of a stack of one."""
        out = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        out.weight = nn.Parameter(self.weight.detach()[0].clone(), requires_grad=False)
        if self.bias is not None:
            out.bias = nn.Parameter(self.bias.detach()[0].clone(), requires_grad=False)
        return out

    def extra_repr(self) -> str:
        s, o, i = self.weight.shape
        return f"stack={s}, in_features={i}, out_features={o}"


def blocks(x: Tensor, stack: int) -> Tensor:
    """Rows ``(S N, ...)`` to ``(S, N, ...)``.

    Raises:
        ValueError: the rows do not divide by the stack.
    """
    if x.shape[0] % stack:
        raise ValueError(
            f"a stack of {stack} members needs a batch of a multiple of {stack} rows, found {x.shape[0]}; "
            "block s of the rows goes to member s. Use `with kilobayes.outer(model, stack):` to show every row to "
            "every member"
        )
    return x.reshape(stack, x.shape[0] // stack, *x.shape[1:])
