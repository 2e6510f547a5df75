r"""Adaptive stochastic weight averaging (ASWA): Demir et al., arXiv:2406.19092, over the adapter only.

At the end of each epoch of the tail, with theta the running weights, phi the average of w of them, and v the
score on the calibration rows:

.. math:: \varphi' = \varphi + (\theta - \varphi) / (w + 1)
.. math:: (\varphi, w) \leftarrow \begin{cases}
   (\theta, 1) & v(\theta) > \max\{v(\varphi'), v(\varphi)\} \quad \text{(hard)} \\
   (\varphi', w + 1) & \text{else if } v(\varphi') \ge v(\varphi) \quad \text{(soft)} \\
   (\varphi, w) & \text{else} \quad \text{(reject)} \end{cases}

so v(phi) never falls, and where every average scores better phi is SWA's. The first epoch's phi is theta.

Departures. The score is the mean log-likelihood unless told otherwise: accuracy, the paper's, is the same for
many averages on a few hundred rows, and ties are accepted. After a hard reset w is 1, not 0, at which
published code throws the reset away with the next soft update. And a rejected average is gone: published code
keeps it, since what it puts back shares memory with what it has overwritten. v(phi) is remembered, so an
epoch costs two passes over the calibration rows instead of three.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kilobayes.posteriors import tail
from kilobayes.protocols import Energy
from kilobayes.tree import clone, member, size, spread
from kilobayes.types import Params, Progress

SCORES = ("nll", "accuracy")


@dataclass(frozen=True, eq=False)
class ASWAState:
    """``average`` ``(K, ...)`` of ``count`` ``(K,)`` epochs' weights and ``score`` ``(K,)``; 0 before any."""

    average: Params
    count: Tensor
    score: Tensor


@dataclass(frozen=True)
class ASWA:
    """The average of the epochs whose weights do not make it worse on the calibration rows.

    Args:
        start: fraction of training after which epochs count; the last one always does.
        score: "nll" (mean log-likelihood) or "accuracy"; on few rows accuracy has many ties.
        rate_held: learning rate held in the tail, relative to the peak.
        anneal: fraction of training over which the rate moves there from where it stood; 0 at once.

    Raises:
        ValueError: a setting outside its range.
    """

    start: float = 0.5
    score: str = "nll"
    rate_held: float = 0.5
    anneal: float = 0.0
    calibrates = True  # no annotation: not an option

    def __post_init__(self) -> None:
        tail.check(self.start, 1, self.rate_held, self.anneal)
        if self.score not in SCORES:
            raise ValueError(f"score must be {' or '.join(SCORES)}, found {self.score!r}")

    def init(self, theta: Params, gen: torch.Generator) -> ASWAState:
        zeros = torch.zeros(size(theta), device=next(iter(theta.values())).device)
        return ASWAState(clone(theta), zeros, zeros.double())

    def rate(self, progress: Progress, own: Callable[[int], float]) -> float:
        return tail.rate(progress, own, self.start, self.rate_held, self.anneal)

    def observe(self, state: ASWAState, theta: Params, progress: Progress) -> ASWAState:
        if progress.done and not bool(state.count.any()):  # stopped before the tail: the last point
            return ASWAState(clone(theta), state.count, state.score)
        return state

    def validate(self, state: ASWAState, theta: Params, progress: Progress, energy: Energy) -> ASWAState:
        if not tail.due(progress, self.start, 1, by_epoch=True):
            return state
        running = clone(theta)
        candidate = {}
        for key, old in state.average.items():
            share = 1.0 / (state.count.double() + 1.0)
            step = _each(share, old) * (running[key].double() - old.double())
            candidate[key] = (old.double() + step).to(old.dtype)
        here, there = self._value(running, energy), self._value(candidate, energy)
        first = state.count == 0
        hard = here > torch.where(first, -math.inf, torch.maximum(there, state.score))
        soft = ~hard & ~first & (there >= state.score)
        average = {}
        for key, old in state.average.items():
            kept = torch.where(_each(soft, old), candidate[key], old)
            average[key] = torch.where(_each(hard, old), running[key], kept)
        count = torch.where(hard, torch.ones_like(state.count), state.count + soft)
        score = torch.where(hard, here, torch.where(soft, there, state.score))
        return ASWAState(average, count, score)

    def _value(self, theta: Params, energy: Energy) -> Tensor:
        """Score ``(K,)`` of each member; minus infinity where its class scores are not finite."""
        logits = energy.logits(theta).double()
        labels = energy.labels.to(logits.device)
        if self.score == "accuracy":
            value = (logits.argmax(dim=-1) == labels).double().mean(dim=1)
        else:
            log_probs = logits.log_softmax(dim=-1)
            value = log_probs.gather(-1, labels.expand(len(logits), -1)[..., None])[..., 0].mean(dim=1)
        finite = logits.isfinite().flatten(1).all(dim=1)
        return torch.where(finite, value, -math.inf).to(next(iter(theta.values())).device)

    def sample(self, state: ASWAState, n: int, gen: torch.Generator) -> Params:
        return member(state.average, spread(size(state.average), n))

    def mean(self, state: ASWAState) -> Params:
        return state.average

    def support(self, state: ASWAState) -> int:
        return size(state.average)


def _each(value: Tensor, leaf: Tensor) -> Tensor:
    """``(K,)`` shaped to meet ``(K, ...)``."""
    return value.view(-1, *[1] * (leaf.dim() - 1))
