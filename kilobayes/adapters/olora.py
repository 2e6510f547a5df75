r"""Orthonormal low-rank adaptation (OLoRA), Büyükakyüz, arXiv:2406.01775, without touching the base.

.. math:: W_{:, :r} = Q R, \qquad A_0 = Q^\top W, \qquad B_0 = Q, \qquad
          y = W x - s\, B_0 A_0 x + s\, B' A' x, \qquad s = \alpha / r

with Q ``(d_out, r)`` of orthonormal columns. The factors B' and A' start at B_0 and A_0, so training starts
at the base model whatever s is. The paper takes the QR decomposition of all of W, without pivoting; its first
r columns and rows are those of the first r columns of W, so A_0 is upper trapezoidal and B_0 A_0 is the
projection of W on the span of its first r columns. The signs are those with which R has a positive diagonal.

**What is trained** is how far the factors have moved, D ``(S, d_out, r)`` and A ``(S, r, d_in)``, both from
zero:

.. math:: B' = Q + D, \quad A' = A_0 + A: \qquad
          \Delta W = s\,(B' A' - Q A_0) = s\,\bigl(D\,(A_0 + A) + Q A\bigr)
          = \begin{pmatrix} s D & s Q \end{pmatrix} \begin{pmatrix} A_0 + A \\ A \end{pmatrix}

Gradients, and so the steps of an optimiser without weight decay, are those of the paper. But
zero now is the base model: weight decay and priors around zero pull towards the base, where they would delete
the part of W that lies in B_0 A_0; rounding to sixteen or eight bits is relative to the update and not to W,
in half-precision products as in files; and the update starts at zero to the last bit.

Departures: the base is never written to (the published code subtracts s B_0 A_0 from its weights), so that it
may be quantised, or carry other adapters, and switching the adapter off gives it back. In return the update
is of rank 2 r, as is the plain LoRA that it exports to. alpha is r unless given: s = 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kilobayes.types import LowRank, Params, Site


@torch.no_grad()
def factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Q ``(d_out, k)`` and A_0 ``(k, d_in)`` in float32, k = rank, or the smaller side of the weight.

    Decomposed in double precision on the CPU, so that machines which round differently find the same.
    """
    if weight.is_meta:
        k = min(rank, *weight.shape)
        return weight.new_empty(len(weight), k).float(), weight.new_empty(k, weight.shape[1]).float()
    q, triangle = torch.linalg.qr(weight[:, :rank].cpu().double())
    q = torch.where(triangle.diagonal() < 0.0, -q, q).float().to(weight.device)
    return q, (q.mT @ weight.float()).triu()


@dataclass(frozen=True)
class OLoRA:
    """LoRA that starts from the orthonormal factors of the base's own weights.

    Args:
        r: rank; at most the smaller side of a site's weight is used.
        alpha: scale; None for ``r``, which is s = 1.

    Raises:
        ValueError: a rank below 1.
    """

    r: int = 8
    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r must be at least 1, found {self.r}")

    @property
    def scale(self) -> float:
        """s, the factor of the product of the factors."""
        return 1.0 if self.alpha is None else self.alpha / self.r

    def rank(self, site: Site) -> int:
        """Rank of the factors at a site."""
        return min(self.r, site.d_in, site.d_out)

    def freeze(self, sites: list[Site]) -> Params:
        """Where the factors start."""
        constants: Params = {}
        for site in sites:
            q, a = factors(site.weight(), self.r)
            constants |= {f"{site.name}/Q": q, f"{site.name}/A0": a}
        return constants

    def init(self, sites: list[Site], constants: Params, stack: int, gen: torch.Generator) -> Params:
        theta: Params = {}
        for site in sites:
            theta[f"{site.name}/A"] = torch.zeros(stack, self.rank(site), site.d_in)
            theta[f"{site.name}/D"] = torch.zeros(stack, site.d_out, self.rank(site))
        return theta

    def build(self, params: Params, constants: Params, site: Site) -> LowRank:
        a, d = params["A"], params["D"]
        start, q = constants["A0"].to(a), self.scale * constants["Q"].to(a)
        return LowRank(
            A=torch.cat([start + a, a], dim=1), B=torch.cat([self.scale * d, q.expand_as(d)], dim=2)
        )

    def count(self, sites: list[Site]) -> int:
        """Numbers trained and stored: the sum over sites of r (d_in + d_out)."""
        return sum(self.rank(site) * (site.d_in + site.d_out) for site in sites)
