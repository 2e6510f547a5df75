r"""The posterior of a sum of independently trained weights :math:`\theta = \sum_i c_i \theta_i`.

Its mean and covariance follow from those of the terms, whatever the distributions,

.. math:: \bar\theta = \sum_i c_i \bar\theta_i, \qquad \Sigma = \sum_i c_i^2 \Sigma_i,

so a sum of Gaussians as SWAG has them is a Gaussian of that kind: diagonals add, and deviations stand side by
side. Of any other posterior, or where the update is not linear in the leaves, draws stand for the
distribution: draw s of the sum is the sum of the terms' draws s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kilobayes import thin, tree
from kilobayes.errors import KilobayesError
from kilobayes.posteriors import SWAG, Scale, Temperature, ask
from kilobayes.posteriors.point import PointState
from kilobayes.posteriors.swag import SWAGState
from kilobayes.types import Params, Posterior

Coefficients = Sequence[Mapping[str, float]]  # for each term, by leaf


def total(stacks: Sequence[Params], coefficients: Coefficients) -> Params:
    """Sums of leaves ``(n, ...)``, in double precision, of the leaves' own dtype."""

    def one(key: str) -> Tensor:
        parts = [c[key] * stack[key].detach().double() for stack, c in zip(stacks, coefficients, strict=True)]
        return sum(parts[1:], parts[0]).to(stacks[0][key])

    return {key: one(key) for key in stacks[0]}


def gaussian(posterior: Any, state: Any) -> tuple[SWAG, SWAGState] | None:
    """The SWAG of one member that a posterior is, its width by calibration in ``scale``; None for others.

    Temperatures are left out: they belong to the scores of their own model.
    """
    scale = 1.0
    while isinstance(posterior, Temperature | Scale):
        if isinstance(posterior, Scale):
            if posterior.of_scores(state) or len(state.factor) > 1:
                return None
            scale *= float(state.factor[0])
        posterior, state = posterior.base, state.inner
    if not isinstance(posterior, SWAG) or len(state.count) > 1:
        return None
    return replace(posterior, scale=posterior.scale * scale), state


def moments(terms: Sequence[tuple[SWAG, SWAGState]], coefficients: Coefficients) -> tuple[SWAG, SWAGState]:
    """The SWAG whose mean and covariance are those of the sum of independent terms.

    Its scale is 1, and its rank the sum of the terms' ranks; :func:`kilobayes.thin.lowered` lowers it.
    """
    average = total([state.average for _, state in terms], coefficients)
    columns = [_columns(state) for _, state in terms]
    rank = sum(columns)
    like = terms[0][1].average
    count = 2.0  # any from 2 up: squares over count is the variance
    squares, deviations = {}, {}
    for key, mean in like.items():
        variance = torch.zeros_like(mean, dtype=torch.float64)
        held = [torch.zeros_like(mean, dtype=torch.float64)[:, None][:, :0]]
        for (method, state), c, k in zip(terms, coefficients, columns, strict=True):
            width = c[key] ** 2 * method.scale
            halved = 0.5 if method.rank else 1.0  # SWAG takes half of the diagonal beside deviations
            variance += width * halved * state.squares[key].double() / state.count.clamp(min=1)[0]
            if k:
                factor = c[key] * math.sqrt(method.scale * (rank - 1) / (k - 1))
                held.append(factor * state.deviations[key].double())
        squares[key] = (count * variance * (2.0 if rank else 1.0)).to(mean)
        deviations[key] = torch.cat(held, dim=1).to(mean)
    counts = torch.full_like(terms[0][1].count, count)
    return SWAG(rank=rank), SWAGState(average, squares, deviations, counts)


def _columns(state: SWAGState) -> int:
    """Deviations that count: one alone has no covariance."""
    found = next(iter(state.deviations.values())).shape[1]
    return found if found > 1 else 0


def mean(posterior: Posterior, state: Any, folder: str) -> Params:
    """The mean of a posterior of one member ``(1, ...)``.

    Raises:
        KilobayesError: it has several.
    """
    found = posterior.mean(state)
    if tree.size(found) > 1:
        raise KilobayesError(
            f"{folder} is an ensemble, whose members have no mean that is a model",
            f"{tree.size(found)} members",
            "--posterior samples sums them member by member",
        )
    return found


def draws(posterior: Posterior, state: Any, n: int, gen: torch.Generator) -> Params:
    """Draws of weights ``(n, ...)``.

    Raises:
        KilobayesError: the posterior does not predict by running sampled weights.
    """
    _, held = thin.drawn(posterior, state, n, gen)
    while not isinstance(held, PointState):
        held = held.inner
    return held.theta


def still(posterior: Posterior, state: Any) -> bool:
    """Whether it is one point: nothing but a mean is to be summed."""
    return ask.members(posterior) == 1 and posterior.support(state) == 1
