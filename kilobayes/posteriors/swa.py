r"""Stochastic weight averaging (SWA), Izmailov et al., arXiv:1803.05407, over the adapter's weights only.

.. math:: \bar\theta_{n+1} = \bar\theta_n + (\theta - \bar\theta_n) / (n + 1)

collected over the tail of training at a held learning rate. The average runs in float64 and is kept in the
weights' own precision at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kilobayes.posteriors import tail
from kilobayes.tree import clone, member, size, spread
from kilobayes.types import Params, Progress


@dataclass(frozen=True, eq=False)
class SWAState:
    """``average`` ``(K, ...)`` of ``count`` ``(K,)`` snapshots."""

    average: Params
    count: Tensor


@dataclass(frozen=True)
class SWA:
    """The average of the weights over the tail of training: one point, usually in a flatter place.

    Args:
        start: fraction of training after which to collect.
        snapshots: how many to collect, evenly over the tail.
        by_epoch: collect at the end of each epoch of the tail instead.
        rate_held: learning rate held in the tail, relative to the peak.
        anneal: fraction of training over which the rate moves there from where it stood; 0 at once.

    Raises:
        ValueError: a setting outside its range.
    """

    start: float = 0.5
    snapshots: int = 20
    by_epoch: bool = False
    rate_held: float = 0.5
    anneal: float = 0.0

    def __post_init__(self) -> None:
        tail.check(self.start, self.snapshots, self.rate_held, self.anneal)

    def init(self, theta: Params, gen: torch.Generator) -> SWAState:
        return SWAState(clone(theta), torch.zeros(size(theta), device=next(iter(theta.values())).device))

    def rate(self, progress: Progress, own: Callable[[int], float]) -> float:
        return tail.rate(progress, own, self.start, self.rate_held, self.anneal)

    def observe(self, state: SWAState, theta: Params, progress: Progress) -> SWAState:
        if tail.due(progress, self.start, self.snapshots, self.by_epoch):
            n = state.count[0].item() + 1
            state = SWAState(
                {
                    k: v.double() + (theta[k].detach().double() - v.double()) / n
                    for k, v in state.average.items()
                },
                state.count + 1,
            )
        if progress.done:
            state = SWAState({k: v.to(theta[k].dtype) for k, v in state.average.items()}, state.count)
        return state

    def sample(self, state: SWAState, n: int, gen: torch.Generator) -> Params:
        return member(state.average, spread(size(state.average), n))

    def mean(self, state: SWAState) -> Params:
        return state.average

    def support(self, state: SWAState) -> int:
        return size(state.average)
