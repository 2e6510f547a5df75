r"""Bayesian low-rank adaptation by backpropagation (BLoB): Wang et al., arXiv:2406.11675.

A Gaussian with a mean and a width of its own for each number of the chosen leaves (LoRA's A), both learned by
gradients; all other leaves, B and heads among them, stay points.

.. math::
    q(A_{ij}) = N(M_{ij}, \Omega_{ij}^2), \quad \Omega = G^2, \qquad
    \mathrm{KL} = \sum_{ij} \log\frac{\sigma_p}{\Omega_{ij}}
        + \frac{\Omega_{ij}^2 + M_{ij}^2}{2 \sigma_p^2} - \frac12

    L = \frac1B \sum_{n=1}^B -\log p(y_n \mid x_n, M + \Omega \circ E_n) + w\, \mathrm{KL}, \qquad
    w = \min\Bigl(\frac cN, \frac\tau P\Bigr)

in nats per row, for N training rows and P random numbers in a member; G ``(S, ...)`` starts uniform in
(epsilon / sqrt 2, epsilon), and E is standard normal: one for each row of the step, shared by its tokens,
so that each row meets one function (``noise="row"``); one for the step, times an outer product of random
signs for each row (flipout, Wen et al., arXiv:1803.04386); or one for the step. Flipout costs no random
numbers to speak of; the rows of a step are uncorrelated under it, but share the absolute values of E.

**The weight.** w = c / N with c = 1 is the evidence lower bound. Where the likelihood and not the prior
decides a width, its optimum is :math:`\Omega_{ij}^2 = w / H_{ij}`, H the mean loss's curvature, so noise
raises the loss by :math:`\frac12 \sum H \Omega^2 = w P / 2`: that is P / 2N nats a row under the bound,
however little a row can tell. A few hundred rows cannot pay for tens of thousands of numbers, and training
ends at the prior: ``BLoB(cost=0.0, speed=10.0)`` on MiniLM, P = 36,864, 300 rows of TREC, 8 epochs at 5e-3
has an accuracy of 0.26 and all widths at 0.2, where the point has 0.92. So the divergence's weight per
number is at most tau: noise then costs the likelihood at most about tau / 2, whatever N and P, and at N > P
/ tau the bound is what it was. The gradient of w KL is then small, and does not decide how the likelihood's
is clipped.

**Departures.** The paper's loop trains M and B by AdamW on the likelihood, and M and G by SGD (rate 0.01)
on the divergence, which is weighted by 2^i / (2^(M + 1) - 1) at step i of a cycle of M steps; here one
AdamW sees the whole loss, G at ``speed`` times the learning rate. An even weight is the default since AdamW
divides a gradient by its size: half a cycle's divergence in its last step would count for less, not more.
The paper's weights are ``BLoB(cost=0.0, kl=N / M, cycle=M, noise="flipout")``, M = floor(100 N^(pi / gamma)
/ batch), gamma = 8. The published code draws signs for each token, so tokens of a row see different weights
and the covariance between them is lost; here a row has one sign pattern. Noise is part of the weights that
are drawn, before the adapter's dropout and never beside it, so a switched-off adapter has none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kilobayes.random import Streams
from kilobayes.tree import chosen, clone, flat, size, spread
from kilobayes.types import Params, Progress

MARK = "~G"


@dataclass(frozen=True, eq=False)
class BLoBState:
    """``average`` ``(K, ...)``: M of the chosen leaves and all others as they are; ``scale``: Omega of the
    chosen."""

    average: Params
    scale: Params


@dataclass(frozen=True)
class BLoB:
    """A Gaussian over LoRA's A whose mean and widths are both trained (mean-field variational inference).

    Args:
        over: glob of the leaves that are random, as ``"*/A"``; "" is every A, else every leaf of the adapter.
        prior: sigma_p, in the units of the weights.
        epsilon: G starts uniform in (epsilon / sqrt 2, epsilon).
        noise: "row" for a draw of the weights for each row; "flipout" for one draw a step whose signs differ
            from row to row; "step" for one draw a step.
        kl: c, weight of the divergence relative to the evidence lower bound's.
        cost: tau, in nats per row: twice what noise may cost the likelihood; 0 for no limit.
        cycle: optimiser steps over which the divergence is weighted 1, 2, 4, ...; 0 for evenly.
        speed: learning rate of G relative to that of the weights.

    Raises:
        ValueError: a setting outside its range.
    """

    over: str = ""
    prior: float = 0.2
    epsilon: float = 0.05
    noise: str = "row"
    kl: float = 1.0
    cost: float = 0.3
    cycle: int = 0
    speed: float = 3.0

    def __post_init__(self) -> None:
        for name in ("prior", "epsilon", "speed"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be above 0, found {getattr(self, name)}")
        if self.noise not in ("row", "flipout", "step"):
            raise ValueError(f"noise must be row, flipout or step, found {self.noise!r}")
        for name in ("kl", "cost"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a number from 0 up, found {getattr(self, name)}")
        if self.cycle < 0:
            raise ValueError(f"cycle must be a number of steps from 0 up, found {self.cycle}")

    def init(self, theta: Params, gen: torch.Generator) -> BLoBState:
        plain = {key: value for key, value in theta.items() if "~" not in key}
        return BLoBState(clone(plain), {key: theta[key + MARK].detach().square() for key in noisy(theta)})

    def extend(self, theta: Params, streams: Streams) -> Params:
        low = 0.5**0.5

        def start(like: Tensor) -> Tensor:
            return self.epsilon * (low + (1.0 - low) * torch.special.ndtr(streams.normal(like)))

        return {key + MARK: start(theta[key].detach()) for key in chosen(theta, self.over)}

    def rates(self, theta: Params) -> dict[str, float]:
        return {key + MARK: self.speed for key in noisy(theta)}

    def perturb(
        self, state: BLoBState, theta: Params, rows: int, streams: Streams, progress: Progress
    ) -> Params:
        each = 1 if self.noise == "step" else rows
        drawn = {key: _repeat(value, each) for key, value in theta.items() if "~" not in key}
        for key in noisy(theta):
            scale, mean = theta[key + MARK].square()[:, None], theta[key][:, None]
            drawn[key] = torch.addcmul(mean, scale, self._noise(theta[key], rows, streams)).flatten(0, 1)
        return drawn

    def _noise(self, like: Tensor, rows: int, streams: Streams) -> Tensor:
        """Standard normal ``(S, B or 1, ...)``."""
        if self.noise == "row":
            return streams.normal(_repeat(like, rows)).unflatten(0, (len(like), rows))
        noise = streams.normal(like)[:, None]
        if self.noise == "flipout":
            for axis in {1, like.dim() - 1}:  # rows and columns of a matrix, the entries of a vector
                shape = [size if at == axis else 1 for at, size in enumerate(like.shape)][1:]
                signs = 2.0 * streams.keep(like.new_empty(len(like) * rows, *shape), 0.5) - 1.0
                noise = noise * signs.unflatten(0, (len(like), rows))
        return noise

    def penalty(self, state: BLoBState, theta: Params, progress: Progress) -> Tensor:
        mean = flat({key: theta[key] for key in noisy(theta)})
        scale = flat({key: theta[key + MARK] for key in noisy(theta)}).square()
        return self.weight(progress, mean[0].numel()) * divergence(mean, scale, self.prior)

    def weight(self, progress: Progress, numbers: int) -> float:
        """w of this step, for P random numbers and N rows."""
        even = self.kl / progress.rows
        if self.cost:
            even = min(even, self.cost / numbers)
        if not self.cycle:
            return even
        return even * self.cycle * share((progress.step - 1) % self.cycle + 1, self.cycle)

    def observe(self, state: BLoBState, theta: Params, progress: Progress) -> BLoBState:
        return self.init(theta, torch.Generator()) if progress.done else state

    def sample(self, state: BLoBState, n: int, gen: torch.Generator) -> Params:
        who = spread(size(state.average), n)
        theta = {key: value[who] for key, value in state.average.items()}
        for key, scale in sorted(state.scale.items()):
            noise = torch.randn(n, *scale.shape[1:], generator=gen).to(scale)  # on the CPU, then moved
            theta[key] = torch.addcmul(theta[key], scale[who], noise)
        return theta

    def mean(self, state: BLoBState) -> Params:
        return state.average

    def support(self, state: BLoBState) -> None:
        return None


def noisy(theta: Params) -> list[str]:
    """Keys of the leaves that have widths, sorted."""
    return sorted(key.removesuffix(MARK) for key in theta if key.endswith(MARK))


def divergence(mean: Tensor, scale: Tensor, prior: float) -> Tensor:
    """KL of N(mean, scale^2) from N(0, prior^2) in nats, summed over all axes but the first: ``(S,)``."""
    each = math.log(prior) - scale.log() + (scale.square() + mean.square()) / (2 * prior**2) - 0.5
    return each.flatten(1).sum(dim=1)


def share(step: int, cycle: int) -> float:
    """pi_i = 2^i / (2^(M+1) - 1) of step i = 1 ... M: late steps carry most, together just below 1."""
    return 2.0 ** (step - cycle) / (2.0 - 2.0**-cycle)


def _repeat(value: Tensor, rows: int) -> Tensor:
    """``(S, ...)`` to ``(S B, ...)``, each member B times."""
    return value[:, None].expand(-1, rows, *value.shape[1:]).flatten(0, 1)
