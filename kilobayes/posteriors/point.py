r"""One point: maximum likelihood, or the maximum of the posterior under a Gaussian prior.

.. math:: L(\theta) = \frac1N \sum_i -\log p(y_i \mid x_i, \theta)
          + \frac{\lambda}{2N} \lVert\theta - \theta_0\rVert^2

The prior is centred at the *initial* factors theta_0, not at zero: a zero-mean prior would pull LoRA's A, and
the factors of methods that start from the base's weights, away from where the method starts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kilobayes.tree import clone, member, size, spread
from kilobayes.types import Params, Progress


@dataclass(frozen=True, eq=False)
class PointState:
    """``theta``: the point of each member ``(K, ...)``; ``center``: the prior's, empty without a prior."""

    theta: Params
    center: Params


@dataclass(frozen=True)
class Point:
    """A single weight vector: maximum likelihood, or maximum a posteriori with a prior around the start.

    Args:
        prior_precision: lambda, in nats per squared weight; 0 is maximum likelihood.

    Raises:
        ValueError: a negative or infinite precision.
    """

    prior_precision: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.prior_precision < float("inf"):
            raise ValueError(f"prior_precision must be a number from 0 up, found {self.prior_precision}")

    def init(self, theta: Params, gen: torch.Generator) -> PointState:
        return PointState(clone(theta), clone(theta) if self.prior_precision else {})

    def penalty(self, state: PointState, theta: Params, progress: Progress) -> Tensor:
        some = next(iter(theta.values()))
        loss = torch.zeros(len(some), dtype=some.dtype, device=some.device)
        for key, center in state.center.items():
            squares = (theta[key] - center).square().flatten(1).sum(dim=1)
            loss = loss + self.prior_precision / (2 * progress.rows) * squares
        return loss

    def observe(self, state: PointState, theta: Params, progress: Progress) -> PointState:
        return PointState(clone(theta), state.center) if progress.done else state

    def sample(self, state: PointState, n: int, gen: torch.Generator) -> Params:
        return member(state.theta, spread(size(state.theta), n))

    def mean(self, state: PointState) -> Params:
        return state.theta

    def support(self, state: PointState) -> int:
        return size(state.theta)
