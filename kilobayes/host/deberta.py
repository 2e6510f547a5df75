"""DeBERTa's relative positions under a stack.

DeBERTa-v2 and v3 put one table of relative positions ``(1, 2 k, d)``, which has no rows, through the same
query and key projections as the hidden states. With a stack each member projects the table its own way, so
the bias that the table adds to the attention is taken member by member; everything else stays one batched
product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kilobayes.host.layer import KilobayesLayer

METHOD = "disentangled_attention_bias"


class PerMember:
    """Stands in for an attention's ``disentangled_attention_bias``, and takes one member at a time."""

    def __init__(self, attention: nn.Module) -> None:
        self.attention = attention

    def __call__(
        self, query: Tensor, key: Tensor, relative_pos: Any, table: Tensor, scale_factor: int
    ) -> Tensor:
        """Attention scores ``(S B heads, T, T)`` of queries and keys ``(S B heads, T, d)``, by member."""
        original = getattr(type(self.attention), METHOD)
        adapted = [m for m in self.attention.children() if isinstance(m, KilobayesLayer)]
        stack = max((layer.stack() for layer in adapted), default=1)
        if stack == 1:
            return original(self.attention, query, key, relative_pos, table, scale_factor)
        parts = []
        try:
            for member, (q, k) in enumerate(zip(query.chunk(stack), key.chunk(stack), strict=True)):
                for layer in adapted:
                    layer.member = member
                parts.append(original(self.attention, q, k, relative_pos, table, scale_factor))
        finally:
            for layer in adapted:
                layer.member = None
        return torch.cat(parts)


def attach(parent: nn.Module) -> None:
    """Make an attention whose projections are adapted ready for a stack; others are left alone."""
    if hasattr(type(parent), METHOD):
        parent.__dict__[METHOD] = PerMember(parent)


def release(model: nn.Module) -> None:
    for module in model.modules():
        module.__dict__.pop(METHOD, None)
