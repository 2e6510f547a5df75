r"""Vector-based random matrix adaptation (VeRA), Kopiczko, Blankevoort and Asano, arXiv:2310.11454.

.. math:: y = W x + \Lambda_b B_{:d_{out}} \Lambda_d A_{:, :d_{in}}\, x

A ``(r, largest d_in)`` and B ``(largest d_out, r)`` are frozen, shared by all sites and members, and drawn
from a seed: each site takes its first columns and rows. Trained are the diagonals d ``(S, r)``, which starts
at ``d_initial``, and b ``(S, d_out)``, which starts at zero, so training starts at the base model.

The draw is that of PEFT: one CPU generator, A and then B uniform in +-sqrt(6 / fan_in), the fan-in of the
largest site for A and r for B. So b and d of a PEFT checkpoint mean the same here
(:func:`kilobayes.host.peft_vera.from_peft`). Unlike there the projections are never saved and belong to an
adapter, not to the model, so that adapters of different rank share one; and there is no dropout.

The update is handed on as ``LowRank`` factors, the diagonals in B: ``S d_out r`` numbers for each site while
a step runs. A stays one matrix for all members.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kilobayes.types import LowRank, Params, Site


def projections(r: int, d_in: int, d_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """A ``(r, d_in)`` and B ``(d_out, r)``, float32 on the CPU: the numbers that PEFT draws from the seed."""
    gen = torch.Generator().manual_seed(seed)

    def draw(rows: int, columns: int) -> Tensor:
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))  # rounded in PEFT's order
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=gen)

    return draw(r, d_in), draw(d_out, r)


@dataclass(frozen=True)
class VeRA:
    """Two trained vectors a layer around random matrices that all layers share.

    Args:
        r: rank; larger than LoRA's, since a rank costs one number a layer.
        d_initial: where d starts; the paper finds 0.1 or less good and 1 bad.
        projection: seed of the shared matrices, PEFT's ``projection_prng_key``.

    Raises:
        ValueError: a rank below 1, or a start of d that is zero or not finite, from where nothing learns.
    """

    r: int = 256
    d_initial: float = 0.1
    projection: int = 0

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r must be at least 1, found {self.r}")
        if not math.isfinite(self.d_initial) or self.d_initial == 0.0:
            raise ValueError(f"d_initial must be a number other than 0, found {self.d_initial}")

    def freeze(self, sites: list[Site]) -> Params:
        """The shared projections, wide enough for the largest site."""
        widest = max(site.d_in for site in sites), max(site.d_out for site in sites)
        a, b = projections(self.r, *widest, self.projection)
        return {"*/A": a, "*/B": b}

    def init(self, sites: list[Site], constants: Params, stack: int, gen: torch.Generator) -> Params:
        theta: Params = {}
        for site in sites:
            theta[f"{site.name}/b"] = torch.zeros(stack, site.d_out)
            theta[f"{site.name}/d"] = torch.full((stack, self.r), self.d_initial)
        return theta

    def build(self, params: Params, constants: Params, site: Site) -> LowRank:
        b, d = params["b"], params["d"]
        a = constants["A"][:, : site.d_in].to(b)
        # The outer product first: then autograd keeps b and d alone, and nothing of B's size.
        outer = b[:, :, None] * d[:, None, :]
        return LowRank(A=a.expand(len(b), -1, -1), B=outer * constants["B"][: site.d_out].to(b))

    def rates(self) -> dict[str, float]:
        """0.04 at the default rate of 2e-3, where trained heads take 2e-3; the paper has 0.004 to 0.1."""
        return {"b": 20.0, "d": 20.0}

    def count(self, sites: list[Site]) -> int:
        """Numbers trained and stored: the sum over sites of d_out + r."""
        return sum(site.d_out + self.r for site in sites)
