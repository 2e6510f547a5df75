"""Full fine-tuning of the adapted matrices, as an adapter of ``editing.py``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kilobayes.types import Params, Site


@dataclass(frozen=True, eq=False)
class Dense:
    """An update matrix of each member, ``(S, d_out, d_in)``."""

    W: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.W.mT)


@dataclass(frozen=True)
class Whole:
    """The update itself is trained, from zero."""

    def init(self, sites: list[Site], constants: Params, stack: int, gen: torch.Generator) -> Params:
        return {f"{site.name}/W": torch.zeros(stack, site.d_out, site.d_in) for site in sites}

    def build(self, params: Params, constants: Params, site: Site) -> Dense:
        return Dense(params["W"])
