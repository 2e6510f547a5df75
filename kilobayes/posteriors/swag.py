r"""Stochastic weight averaging, Gaussian (SWAG): Maddox et al., arXiv:1902.02476.

On LoRA: Onal et al., arXiv:2405.03425.

Over n snapshots of the tail of training, at a held learning rate:

.. math:: \bar\theta = \tfrac1n \sum \theta_i, \qquad
          \Sigma_d = \operatorname{diag}(\tfrac1n \sum (\theta_i - \bar\theta)^2), \qquad
          D = [\theta_i - \bar\theta_i]_{\text{last } K}
.. math:: \tilde\theta = \bar\theta
          + \sqrt{c}\,\bigl(\tfrac{1}{\sqrt2} \Sigma_d^{1/2} z_1 + \tfrac{1}{\sqrt{2 (K-1)}} D z_2\bigr)

with theta-bar_i the running mean after snapshot i. ``rank=0`` is SWAG-diagonal: theta-bar + sqrt(c)
Sigma_d^{1/2} z, with the whole variance.
``c = 1`` is the original's covariance; the published LoRA code doubles it.

Collected from a quarter of training on, at the peak rate: what wanders little, late and slowly, agrees with
itself, and its draws change no prediction (measured on two data sets, calibration rows; the published code
starts past half and lowers the rate).

Departures: moments by Welford's update in float64 instead of E[theta^2] - mean^2, which cancels; K is the
number of deviations held, never more than there are snapshots.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kilobayes.posteriors import tail
from kilobayes.tree import clone, map_params, size, spread
from kilobayes.types import Params, Progress


@dataclass(frozen=True, eq=False)
class SWAGState:
    """``average`` ``(K, ...)``, ``squares`` (sums of squared deviations, ``(K, ...)``), ``deviations``
    ``(K, at most rank, ...)`` and ``count`` ``(K,)``, for K members."""

    average: Params
    squares: Params
    deviations: Params
    count: Tensor


@dataclass(frozen=True)
class SWAG:
    """A Gaussian around the average of the tail of training, with its low-rank plus diagonal covariance.

    Args:
        rank: deviations kept, at least 2; 0 for the diagonal alone.
        scale: c, the covariance relative to the original's.
        start: fraction of training after which to collect.
        snapshots: how many to collect, evenly over the tail.
        by_epoch: collect at the end of each epoch of the tail instead.
        rate_held: learning rate held in the tail, relative to the peak.
        anneal: fraction of training over which the rate moves there from where it stood; 0 at once.

    Raises:
        ValueError: a setting outside its range.
    """

    rank: int = 10
    scale: float = 1.0
    start: float = 0.25
    snapshots: int = 20
    by_epoch: bool = False
    rate_held: float = 1.0
    anneal: float = 0.0

    def __post_init__(self) -> None:
        tail.check(self.start, self.snapshots, self.rate_held, self.anneal)
        if self.rank < 0 or self.rank == 1:  # one deviation has no covariance: it is divided by K - 1
            raise ValueError(f"rank must be 0 or at least 2, found {self.rank}")
        if not 0.0 <= self.scale < math.inf:
            raise ValueError(f"scale must be a number from 0 up, found {self.scale}")

    def init(self, theta: Params, gen: torch.Generator) -> SWAGState:
        zeros = map_params(torch.zeros_like, clone(theta))
        none = map_params(lambda t: t[:, None][:, :0].clone(), clone(theta))
        return SWAGState(
            clone(theta), zeros, none, torch.zeros(size(theta), device=zeros[next(iter(zeros))].device)
        )

    def rate(self, progress: Progress, own: Callable[[int], float]) -> float:
        return tail.rate(progress, own, self.start, self.rate_held, self.anneal)

    def observe(self, state: SWAGState, theta: Params, progress: Progress) -> SWAGState:
        if tail.due(progress, self.start, self.snapshots, self.by_epoch):
            state = self._collect(state, theta)
        if progress.done:
            if state.count[0] < 2:
                warnings.warn("SWAG saw fewer than two snapshots: its covariance is zero", stacklevel=2)
            like = {k: v.dtype for k, v in theta.items()}
            state = SWAGState(
                {k: v.to(like[k]) for k, v in state.average.items()},
                {k: v.to(like[k]) for k, v in state.squares.items()},
                state.deviations,
                state.count,
            )
        return state

    def _collect(self, state: SWAGState, theta: Params) -> SWAGState:
        n = state.count[0].item() + 1
        average, squares, deviations = {}, {}, {}
        for key, old in state.average.items():
            value = theta[key].detach().double()
            before = value - old.double()
            average[key] = old.double() + before / n
            after = value - average[key]
            squares[key] = state.squares[key].double() + before * after
            held = [state.deviations[key], after.to(theta[key].dtype)[:, None]]
            deviations[key] = torch.cat(held, dim=1)[:, -self.rank :] if self.rank else state.deviations[key]
        return SWAGState(average, squares, deviations, state.count + 1)

    def sample(self, state: SWAGState, n: int, gen: torch.Generator) -> Params:
        who = spread(size(state.average), n)
        columns = next(iter(state.deviations.values())).shape[1]
        # both halves, or, where no deviations are kept, the whole variance
        shrink = math.sqrt(0.5) if self.rank else 1.0
        z2 = torch.randn(n, columns, generator=gen)  # on the CPU, so draws do not depend on the device
        theta: Params = {}
        for key, average in sorted(state.average.items()):  # files sort keys; draws must not depend on it
            variance = state.squares[key][who] / state.count[who].clamp(min=1).view(
                -1, *[1] * (average.dim() - 1)
            )
            z1 = torch.randn(variance.shape, generator=gen).to(variance)
            step = shrink * variance.clamp(min=0).sqrt() * z1
            if columns > 1:
                kept = state.deviations[key][who]
                step = step + torch.einsum("nk,nk...->n...", z2.to(kept), kept) / math.sqrt(2 * (columns - 1))
            theta[key] = average[who] + math.sqrt(self.scale) * step
        return theta

    def mean(self, state: SWAGState) -> Params:
        return state.average

    def support(self, state: SWAGState) -> int | None:
        return None if self.scale and state.count[0] > 1 else size(state.average)
