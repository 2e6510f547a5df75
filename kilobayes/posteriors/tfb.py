r"""Training-free Bayesianisation (TFB): Shi et al., arXiv:2412.05723.

.. math:: B = U D V^\top, \qquad
          A' = A + \sigma\,(B^\top B)^{-1/2} E = A + \sigma\, V D^{-1} V^\top E, \qquad E_{ij} \sim N(0, 1)
.. math:: B A' = B A + \sigma\, U V^\top E, \qquad
          \operatorname{Cov}(\text{a column of } B A') = \sigma^2\, U U^\top

Noise on LoRA's A ``(r, d_in)``, whitened by B ``(d_out, r)``, so that the update's noise has one width in
every direction that B reaches, at all sites alike, whatever factors the product is written in. sigma is the
largest that the anchor rows tolerate: the mean negative log-likelihood (nats per row) of probabilities
averaged over ``samples`` draws, or the share of labels kept, gets no worse than by ``tolerance``, relative to
the point's.

The paper writes this in the singular basis, B' = U D and A' = V^T A with noise sigma / d_i in row i: the
same law of the update. Here B and the mean stay as they were trained, so nothing but A varies, and adapters
that do more with A and B than multiply them keep their function. sigma is in units of the entries of B A; a
factor in front of it, LoRA's alpha / r, is found with it.

Departures from the published code: the tolerance is relative to the mean likelihood, not divided once more by
the number of anchor rows (which made 0.3% for 500 rows 150%); what comes back is the largest width seen to be
tolerated, not the smallest that was not; the bracket grows and shrinks until it holds the answer; every
width is judged with the same E; a draw is one function, not another for each token. Directions in which B is
``CUT`` times weaker than in its strongest have no noise: their part of A would have to be huge. The default
tolerance is 10%, not the paper's 0.3%, for which members hardly differ.

Leaves without such a partner (other adapters, or another ``over``) get noise of sigma times the root mean
square of each leaf.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kilobayes.posteriors import ask
from kilobayes.posteriors.point import Point
from kilobayes.posteriors.scale import mixture_nll
from kilobayes.posteriors.wrapping import Wrapping
from kilobayes.protocols import Energy, Predicts
from kilobayes.tree import chosen, concatenate_states, member, size, split_key, spread, state_member
from kilobayes.types import Params, Posterior

CUT = 1e-3
START = 0.01  # the bracket's; the paper's is 0.001 to 0.015
STEPS = 10  # factors of 4 that the bracket may move by


@dataclass(frozen=True, eq=False)
class TFBState:
    """``inner``: the wrapped point's state; ``sigma`` ``(K,)``: the width of each member's noise."""

    inner: object
    sigma: Tensor


@dataclass(frozen=True)
class TFB(Wrapping):
    """Noise around a trained point, as wide as its own predictions allow; no gradients, one number stored.

    Args:
        base: the point: ``Point()``, an average as ``SWA()``, or the mean of any other, as of ``BLoB()``.
        measure: what must not get worse: "nll", or "accuracy".
        tolerance: by how much, relative to the point's own.
        labels: "own" are the point's own predictions, "true" those of the data.
        anchor: "train" or "calibration" rows.
        rows: at most so many of them, evenly spaced.
        samples: draws that a width is judged by.
        bisections: of the bracket, whose ends are a factor of 4 apart.
        over: a glob of the leaves that get noise; "" as for every posterior.

    Raises:
        ValueError: a setting outside its range.
    """

    base: Posterior = field(default=Point())
    measure: str = "nll"
    tolerance: float = 0.1
    labels: str = "own"
    anchor: str = "train"
    rows: int = 100
    samples: int = 5
    bisections: int = 4
    over: str = ""

    def __post_init__(self) -> None:
        known = {
            "measure": ("nll", "accuracy"),
            "labels": ("own", "true"),
            "anchor": ("train", "calibration"),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be {' or '.join(values)}, found {getattr(self, name)!r}")
        for name in ("rows", "samples", "bisections"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if not 0.0 < self.tolerance < float("inf"):
            raise ValueError(f"tolerance must be above 0, found {self.tolerance}")

        if isinstance(ask.innermost(self.base), Predicts):
            raise ValueError(
                f"{type(ask.innermost(self.base)).__name__} predicts in its own way, without draws"
            )

    @property
    def calibrates(self) -> bool:
        """Whether rows that are not trained on are needed."""
        return self.anchor == "calibration"

    def init(self, theta: Params, gen: torch.Generator) -> TFBState:
        return TFBState(self.base.init(theta, gen), torch.zeros(size(theta)))

    def fit(self, state: TFBState, energy: Energy, gen: torch.Generator) -> TFBState:
        state = super().fit(state, energy, gen)
        rows = (energy if self.calibrates else energy.train).part(self.rows)
        each = [self._search(state_member(state, k), rows, gen) for k in range(len(state.sigma))]
        return concatenate_states(each)  # type: ignore[no-any-return]

    def _search(self, state: TFBState, energy: Energy, gen: torch.Generator) -> TFBState:
        """One member's width: the largest that was tried and tolerated, 0 if none was."""
        mean = self.base.mean(state.inner)
        noise = directions(mean, self.samples, self.over, gen)

        def scores(theta: Params) -> Tensor:
            kept = ask.restricted(energy, theta, mean)
            return ask.transform(self.base, state.inner, energy.logits(kept)).double()

        point = scores(mean)
        labels = point[0].argmax(dim=-1) if self.labels == "own" else energy.labels.to(point.device)

        def cost(logits: Tensor) -> float:
            if self.measure == "nll":
                return mixture_nll(logits, labels, tempered=False)
            return -float((logits.softmax(dim=-1).mean(dim=0).argmax(dim=-1) == labels).double().mean())

        before = cost(point)
        limit = before + self.tolerance * abs(before)

        def tolerated(sigma: float) -> bool:
            return cost(scores(moved(mean, noise, torch.full((self.samples,), sigma)))) <= limit

        found = largest(tolerated, self.bisections) if any(bool(v.any()) for v in noise.values()) else 0.0
        return replace(state, sigma=torch.full_like(state.sigma, found))

    def sample(self, state: TFBState, n: int, gen: torch.Generator) -> Params:
        mean = self.base.mean(state.inner)
        return moved(mean, directions(mean, n, self.over, gen), state.sigma[spread(size(mean), n)])

    def support(self, state: TFBState) -> int | None:
        return None if bool(state.sigma.any()) else len(state.sigma)


def directions(mean: Params, n: int, over: str, gen: torch.Generator) -> Params:
    """Noise ``(n, ...)`` of width 1 for the chosen leaves of means ``(K, ...)``, n draws spread over K."""
    who, noise = spread(size(mean), n), {}
    for key in chosen(mean, over):
        value = mean[key]
        site, leaf = split_key(key)
        partner = mean.get(f"{site}/B") if leaf == "A" else None
        drawn = torch.randn(n, *value.shape[1:], generator=gen).to(value.device)  # drawn on the CPU
        if partner is not None and value.dim() == partner.dim() == 3 and value.shape[1] == partner.shape[2]:
            noise[key] = whitening(partner).to(drawn)[who] @ drawn
        else:
            rms = value.double().square().flatten(1).mean(dim=1).sqrt().to(drawn)[who]
            noise[key] = rms.view(-1, *[1] * (value.dim() - 1)) * drawn
    return noise


def whitening(b: Tensor) -> Tensor:
    """The pseudo-inverse of ``(B^T B)^{1/2}``: ``(K, o, r)`` to ``(K, r, r)``, float64."""
    wide = b.detach().double()
    squares, vectors = torch.linalg.eigh(wide.mT @ wide)
    d = squares.clamp(min=0).sqrt()
    inverse = torch.where(d > CUT * d.amax(dim=-1, keepdim=True), 1 / d, torch.zeros_like(d))
    return vectors * inverse[:, None, :] @ vectors.mT


def moved(mean: Params, noise: Params, sigma: Tensor) -> Params:
    """The means ``(K, ...)`` plus each draw's sigma ``(n,)`` times its noise ``(n, ...)``."""
    theta = member(mean, spread(size(mean), len(sigma)))
    for key, value in noise.items():
        step = sigma.to(value).view(-1, *[1] * (value.dim() - 1)) * value
        theta[key] = (theta[key] + step).to(theta[key].dtype)
    return theta


def largest(tolerated: Callable[[float], bool], bisections: int) -> float:
    """The largest width that was tried and tolerated, from a bracket around the limit; 0 if none was."""
    low, high, sigma = 0.0, float("inf"), START
    for _ in range(STEPS):
        if tolerated(sigma):
            low, sigma = sigma, 4 * sigma
        else:
            high, sigma = sigma, sigma / 4
        if low and high < float("inf"):
            break
    for _ in range(bisections if low and high < float("inf") else 0):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if tolerated(middle) else (low, middle)
    return low
