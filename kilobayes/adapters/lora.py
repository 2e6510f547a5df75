r"""Low-rank adaptation (LoRA), Hu et al., arXiv:2106.09685; rsLoRA's scale: Kalajdzievski, arXiv:2312.03732.

.. math:: y = W x + s\, B A x, \qquad s = \alpha / r \quad (\text{rsLoRA: } \alpha / \sqrt r)

A ``(S, r, d_in)`` starts Kaiming-uniform with a = sqrt 5, that is U(+-1/sqrt(d_in)); B ``(S, d_out, r)``
starts at zero, so training starts at the base model.

Departure: dropout is a mask on the *columns of A*, shared by all rows and tokens of a member in a step,
instead of a mask per token. So a dropout sample is one function of the input, a member of the stack like
any other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kilobayes.random import Streams
from kilobayes.types import LowRank, Params, Site


@dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation: a product of two thin matrices added to each adapted weight.

    Args:
        r: rank.
        alpha: scale; None for ``2 r``.
        rslora: divide alpha by sqrt r instead of r.
        dropout: probability that a column of A is dropped in a training step.

    Raises:
        ValueError: a rank below 1, or a dropout outside [0, 1).
    """

    r: int = 8
    alpha: float | None = None
    rslora: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r must be at least 1, found {self.r}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), found {self.dropout}")

    @property
    def scale(self) -> float:
        """s, the factor of B A."""
        alpha = 2.0 * self.r if self.alpha is None else self.alpha
        return alpha / math.sqrt(self.r) if self.rslora else alpha / self.r

    def init(self, sites: list[Site], constants: Params, stack: int, gen: torch.Generator) -> Params:
        theta: Params = {}
        for site in sites:
            uniform = torch.rand(stack, self.r, site.d_in, generator=gen)
            theta[f"{site.name}/A"] = (2.0 * uniform - 1.0) / math.sqrt(site.d_in)
            theta[f"{site.name}/B"] = torch.zeros(stack, site.d_out, self.r)
        return theta

    def build(self, params: Params, constants: Params, site: Site) -> LowRank:
        return LowRank(A=params["A"], B=self.scale * params["B"])

    def drop(self, params: Params, streams: Streams) -> Params:
        """A training step's dropout: each column of A is zero with probability p, else divided by 1 - p."""
        if not self.dropout:
            return params
        keep = 1.0 - self.dropout

        def mask(a: Tensor) -> Tensor:
            return a * (streams.keep(a[:, :1], keep) / keep)

        return {key: mask(value) if key.endswith("/A") else value for key, value in params.items()}

    def count(self, sites: list[Site]) -> int:
        """Numbers trained and stored: the sum over sites of r (d_in + d_out)."""
        return sum(self.r * (site.d_in + site.d_out) for site in sites)
