"""A hosted linear model with real outputs, whose trained head has closed forms."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn


class Regression(nn.Module):
    """A linear head of one output, plus nothing times an adapted layer."""

    def __init__(self, features: int, bias: bool = True) -> None:
        super().__init__()
        self.body = nn.Linear(features, features)
        self.head = nn.Linear(features, 1, bias=bias)

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(values=self.head(x + 0.0 * self.body(x)))
