r"""Deep ensembles: Lakshminarayanan et al., arXiv:1612.01474.

Over SWAG it is MultiSWAG: Wilson & Izmailov, arXiv:2002.08791.

.. math:: p(y \mid x) = \frac1M \sum_m \mathbb{E}_{\theta \sim q_m}\, p(y \mid x, \theta)

M members with their own initial weights and data order, trained as one stack; their posteriors are pooled in
equal parts. Probabilities are averaged, never scores, and mutual information is taken over all members'
samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from kilobayes.posteriors import ask
from kilobayes.posteriors.point import Point
from kilobayes.posteriors.wrapping import Wrapping
from kilobayes.protocols import Energy
from kilobayes.tree import concatenate_states, size, state_member
from kilobayes.types import Params, Posterior


@dataclass(frozen=True)
class Ensemble(Wrapping):
    """Several members trained from different seeds as one stack, their posteriors pooled.

    Args:
        base: the posterior of each member: ``Point()`` for a deep ensemble, ``SWAG()`` for MultiSWAG.
        members: M.

    Raises:
        ValueError: fewer than one member, or an ensemble of ensembles.
    """

    base: Posterior = field(default=Point())
    members: int = 5

    def __post_init__(self) -> None:
        if self.members < 1:
            raise ValueError(f"members must be at least 1, found {self.members}")
        if ask.members(self.base) > 1:
            raise ValueError("an ensemble of ensembles is one larger ensemble: Ensemble(base, members=...)")

    def inner(self, state: Any) -> Any:
        return state  # the base's, of K members

    def around(self, state: Any, inner: Any) -> Any:
        return inner

    def init(self, theta: Params, gen: torch.Generator) -> Any:
        return self.base.init(theta, gen)

    def fit(self, state: Any, energy: Energy, gen: torch.Generator) -> Any:
        count = size(self.base.mean(state))
        return concatenate_states(
            [ask.fit(self.base, state_member(state, k), energy, gen) for k in range(count)]
        )
