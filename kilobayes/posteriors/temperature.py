r"""Temperature scaling, Guo et al., arXiv:1706.04599: the baseline that every posterior must beat.

.. math:: p(y \mid x) = \frac1S \sum_s \operatorname{softmax}(f_s(x) / T)_y, \qquad
          T = \arg\min_T \sum_{i \in \text{calibration}} -\log p(y_i \mid x_i)

For a point S = 1, the original. Over a posterior the scores of each sample are divided before the
probabilities are averaged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kilobayes.posteriors import ask
from kilobayes.posteriors.point import Point
from kilobayes.posteriors.wrapping import Wrapping
from kilobayes.protocols import Energy
from kilobayes.search import lowest
from kilobayes.tree import size, spread
from kilobayes.types import Params, Posterior


@dataclass(frozen=True, eq=False)
class TemperatureState:
    """``inner``: the wrapped posterior's state; ``temperature`` ``(K,)``."""

    inner: object
    temperature: Tensor


@dataclass(frozen=True)
class Temperature(Wrapping):
    """One number that divides the scores, fitted on the calibration split, over any posterior.

    Args:
        base: the posterior whose scores are divided.
        samples: draws of a continuous posterior that the fit averages over, and at least one of each member.

    Raises:
        ValueError: fewer than one sample.
    """

    base: Posterior = field(default=Point())
    samples: int = 10
    calibrates = True  # no annotation: not an option

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, found {self.samples}")

    def init(self, theta: Params, gen: torch.Generator) -> TemperatureState:
        return TemperatureState(self.base.init(theta, gen), torch.ones(size(theta)))

    def fit(self, state: TemperatureState, energy: Energy, gen: torch.Generator) -> TemperatureState:
        state = super().fit(state, energy, gen)
        count = ask.count(self.base, state.inner, max(self.samples, len(state.temperature)))
        drawn = ask.logits(self.base, state.inner, energy, count, gen)
        logits = ask.transform(self.base, state.inner, drawn).double()
        best = best_temperature(logits, energy.labels.to(logits.device))
        return TemperatureState(state.inner, torch.full_like(state.temperature, best))

    def transform(self, state: TemperatureState, logits: Tensor) -> Tensor:
        divisor = state.temperature.to(logits)[spread(len(state.temperature), len(logits))]
        return ask.transform(self.base, state.inner, logits) / divisor[:, None, None]


def best_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T in [1/20, 20] of lowest mean NLL of the averaged probabilities, ``logits`` ``(S, N, C)``.

    A grid over log T and then Brent's method in the best cell: for a mixture the NLL need not be convex in T.
    """

    def nll(log_t: float) -> float:
        scores = torch.log_softmax(logits / math.exp(log_t), dim=-1)
        picked = scores.gather(-1, labels.expand(len(logits), -1)[..., None])[..., 0]
        return float(-picked.logsumexp(dim=0).mean())  # up to log S, which does not depend on T

    # T = 1 is on the grid, so the result is never worse than none
    return math.exp(lowest(nll, [cell / 4 for cell in range(-12, 13)]))
