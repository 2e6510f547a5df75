"""Classifier heads: trained whole, one copy per member."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kilobayes.host.rows import blocks


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

    Keeps the names ``weight`` and ``bias``, so PEFT saves and loads it like the head it replaces. The numbers
    may be wider than ``plain_dtype``, that of the layer it replaces: the product is taken in the input's
    dtype.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self.plain_dtype = weight.dtype
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
        """The plain layer of a stack of one, in the dtype of the layer that was replaced."""
        out = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        out.weight = nn.Parameter(
            self.weight.detach()[0].to(self.plain_dtype, copy=True), requires_grad=False
        )
        if self.bias is not None:
            out.bias = nn.Parameter(
                self.bias.detach()[0].to(self.plain_dtype, copy=True), requires_grad=False
            )
        return out

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"installed": None}  # copies do not share installed operators, nor their graph

    def extra_repr(self) -> str:
        s, o, i = self.weight.shape
        return f"stack={s}, in_features={i}, out_features={o}"


def unstackable(head: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Parts of a head with parameters of their own that are not linear layers, by path."""
    for path, module in head.named_modules():
        if type(module) not in (nn.Linear, StackedLinear) and any(
            True for _ in module.parameters(recurse=False)
        ):
            yield path, module


def stack_head(parent: nn.ModuleDict, name: str, stack: int) -> None:
    """Replace every linear layer of the head ``parent[name]`` by copies, trained or not as before."""
    head = parent[name]
    trainable = any(p.requires_grad for p in head.parameters())
    if type(head) is nn.Linear:
        parent[name] = StackedLinear.repeat(head, stack)
    for path, module in list(head.named_modules()):
        if path and type(module) is nn.Linear:
            owner, _, child = path.rpartition(".")
            setattr(head.get_submodule(owner), child, StackedLinear.repeat(module, stack))
    parent[name].requires_grad_(trainable)
