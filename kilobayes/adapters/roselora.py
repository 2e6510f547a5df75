r"""Row- and column-wise sparse low-rank adaptation (RoseLoRA): Wang et al., arXiv:2406.10777.

.. math:: y = W x + \tfrac{\alpha}{r} B A x

with A ``(S, r, d_in)``, whose rows are sparse, and B ``(S, d_out, r)``, whose columns are. After step t of T
(w the weights after it, g the gradient that it took) each row of A and each column of B keeps the share
rho_t of its numbers with the largest smoothed sensitivity; all others become zero:

.. math:: \bar I_t = \beta \bar I_{t-1} + (1 - \beta) \lvert w \odot g \rvert, \qquad
          \rho_t = \begin{cases} 1 & t < t_i \\
          \rho + (1 - \rho) \bigl(1 - \frac{t - t_i}{t_f - t_i}\bigr)^3 & t_i \le t < t_f \\
          \rho & t_f \le t \end{cases}

The update then has at most :meth:`RoseLoRA.density` of its entries other than zero, so a merge leaves the
rest of W as it is, bit for bit. A file holds ceil(rho d) values and positions for each row or column of
width d.

``start`` and ``end`` are t_i / T and t_f / T. The published code edits facts in T = 25 steps with t_i = 3,
t_f = 20, a dropout of 0.1 and A, B within +-0.003, of which the paper does not speak:
``RoseLoRA(start=0.12, end=0.8, clamp=0.003, dropout=0.1)``.

Departures. Exactly ceil(rho_t d) numbers are kept, where published code keeps one more, stops with an error
as rho_t comes close to 1, and prunes nothing of a row without sensitivity: such a row, as all of A in the
first step, since B starts at zero, loses its numbers of smallest magnitude. What is zero may grow again until
t_f, by the optimiser's moments too, which are not masked; from t_f on the support is frozen, so that averages
and posteriors live on it. Draws of a posterior keep the zeros of the weights around them. While training,
these zeros have the gradients of a draw without them, so that they may grow; after it, of an average of
weights that were denser, the ceil(rho d) largest numbers of each row stay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kilobayes.adapters import sparse
from kilobayes.adapters.lora import LoRA
from kilobayes.random import Streams
from kilobayes.types import LowRank, Params, Progress, Site

GONE = -1.0  # marks, in the memo, what is frozen at zero; importance is never negative


@dataclass(frozen=True)
class RoseLoRA:
    """Low-rank adaptation whose rows of A and columns of B are sparse, so that few entries of W change.

    Args:
        r: rank.
        alpha: scale; it is divided by r.
        keep: rho, the share of each row of A and column of B that is kept in the end.
        start, end: fractions of training at which pruning starts, and is done.
        beta: decay of the smoothed sensitivity.
        clamp: largest absolute value of a number of A or B; 0 never clamps.
        dropout: probability that a column of A is dropped in a training step.

    Raises:
        ValueError: a setting outside its range.
    """

    r: int = 8
    alpha: float = 32.0
    keep: float = 0.05
    start: float = 0.1
    end: float = 0.8
    beta: float = 0.8
    clamp: float = 0.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self._lora()
        if not 0.0 < self.keep <= 1.0:
            raise ValueError(f"keep must lie in (0, 1], found {self.keep}")
        if not 0.0 <= self.start <= self.end <= 1.0:
            raise ValueError(f"0 <= start <= end <= 1 must hold, found {self.start} and {self.end}")
        if not 0.0 <= self.beta < 1.0:
            raise ValueError(f"beta must lie in [0, 1), found {self.beta}")
        if not 0.0 <= self.clamp < math.inf:
            raise ValueError(f"clamp must be a number from 0 up, found {self.clamp}")

    def _lora(self) -> LoRA:
        return LoRA(r=self.r, alpha=self.alpha, dropout=self.dropout)

    def init(self, sites: list[Site], constants: Params, stack: int, gen: torch.Generator) -> Params:
        return self._lora().init(sites, constants, stack, gen)

    def build(self, params: Params, constants: Params, site: Site) -> LowRank:
        return self._lora().build(params, constants, site)

    def drop(self, params: Params, streams: Streams) -> Params:
        return self._lora().drop(params, streams)

    def share(self, step: float, steps: float) -> float:
        """rho_t, the share of numbers kept after a step, from 1."""
        first, last = self.start * steps, self.end * steps
        if step >= last - 1e-9:
            return self.keep
        if step <= first:
            return 1.0
        return self.keep + (1.0 - self.keep) * (1.0 - (step - first) / (last - first)) ** 3

    def project(self, theta: Params, gradients: Params, memo: Params, progress: Progress) -> Params:
        """Smooth the sensitivities, held in ``memo`` as ``(S, r, width)``, and prune each row and column."""
        share = self.share(progress.step, progress.steps)
        new = {}
        for key, weights in _sparse(theta):
            sensitivity = (weights * _lines(key, gradients[key])).abs()
            # a member that diverged stays as it is, with gradients that are not numbers, but is pruned
            sensitivity = torch.where(torch.isfinite(sensitivity), sensitivity, 0.0)
            old = memo.get(key, torch.zeros_like(sensitivity))
            now = torch.where(old < 0, old, torch.lerp(sensitivity, old, self.beta))
            # where nothing is known, magnitude decides, below everything that is known
            score = torch.where(now > 0, now, -1.0 / weights.abs())
            kept = sparse.largest(score, _count(share, weights.shape[-1])) & (now >= 0)
            weights.masked_fill_(~kept, 0.0)
            if self.clamp:
                weights.clamp_(-self.clamp, self.clamp)
            new[key] = now.masked_fill(~kept, GONE) if share <= self.keep else now
        return new

    def restrict(self, draws: Params, around: Params, progress: Progress | None) -> Params:
        """Draws with the zeros of ``around``; after training (no progress), on its largest numbers alone."""
        if progress is not None and self.share(progress.step - 1, progress.steps) >= 1.0:
            return draws
        kept = dict(draws)
        for key, weights in _sparse(around):
            if draws[key] is around[key] and progress is not None:
                continue
            zero = weights == 0
            if progress is None:
                zero |= ~sparse.largest(weights.abs(), _count(self.keep, weights.shape[-1]))
                kept[key] = draws[key].masked_fill(_lines(key, zero), 0.0)
            else:  # zero, with the gradient of a number that is not
                kept[key] = draws[key] - draws[key].detach() * _lines(key, zero)
        return kept

    def rates(self) -> dict[str, float]:
        """A and B at the rate itself, 2e-3 by default (they collapse from 2e-2 on); heads faster, at 1e-2."""
        return {"head": 5.0}

    def density(self, site: Site) -> float:
        """Share of entries of a site's update that may differ from zero, about r rho^2: a bound.

        Supports that fall at random give 1 - (1 - rho^2)^r of them.
        """
        kept = _count(self.keep, site.d_in) * _count(self.keep, site.d_out)
        return min(1.0, self.r * kept / (site.d_in * site.d_out))

    def count(self, sites: list[Site]) -> int:
        """Numbers trained: the sum over sites of r (d_in + d_out)."""
        return self._lora().count(sites)

    def stored(self, sites: list[Site]) -> int:
        """Bytes of :meth:`pack`: 6 r ceil(rho d), summed over both widths d of each site; 8 if it is wide."""
        counts = zip(self._shapes(sites), self._counts(sites), strict=True)
        return sum(self.r * count * (4 + sparse.kind(width)[1].itemsize) for (_, width), count in counts)

    def pack(self, theta: Params, sites: list[Site]) -> dict[str, Tensor]:
        """Values and positions in rows of A and columns of B, A before B, site by site."""
        return sparse.pack([_lines(key, theta[key].detach()) for key in _keys(sites)], self._counts(sites))

    def unpack(self, packed: dict[str, Tensor], sites: list[Site]) -> Params:
        """The leaves, bit for bit."""
        found = sparse.unpack(packed, self._shapes(sites), self._counts(sites))
        return {key: _lines(key, m).contiguous() for key, m in zip(_keys(sites), found, strict=True)}

    def _shapes(self, sites: list[Site]) -> list[tuple[int, int]]:
        return [(self.r, width) for site in sites for width in (site.d_in, site.d_out)]

    def _counts(self, sites: list[Site]) -> list[int]:
        return [_count(self.keep, width) for _, width in self._shapes(sites)]


def _keys(sites: list[Site]) -> list[str]:
    return [f"{site.name}/{leaf}" for site in sites for leaf in "AB"]


def _sparse(theta: Params) -> list[tuple[str, Tensor]]:
    """Keys of A and B, and views ``(S, r, width)`` of them."""
    return [(k, _lines(k, v.detach())) for k, v in theta.items() if k.endswith(("/A", "/B"))]


def _lines(key: str, leaf: Tensor) -> Tensor:
    """Rows of A and columns of B last; its own inverse."""
    return leaf.mT if key.endswith("/B") else leaf


def _count(share: float, width: int) -> int:
    """ceil(share width), at least 1: 0.07 times 100 is 7, though floats make it a little more."""
    return max(1, math.ceil(share * width - 1e-9))
