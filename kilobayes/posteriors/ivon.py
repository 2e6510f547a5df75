r"""Improved variational online Newton (IVON): Shen et al., arXiv:2402.17641.

On LoRA: Cong et al., arXiv:2411.04421.

A Gaussian with a diagonal covariance, found by natural gradients at the cost of Adam: the second moment that
Adam divides by is replaced by the Hessian's diagonal h, and h is also the posterior's precision.

.. math:: \theta = m + \sigma \epsilon, \quad \sigma^2 = \frac{1}{\lambda (h + \delta)}, \qquad
          \hat g = \nabla_\theta \bar\ell(\theta), \quad \hat h = \hat g\, \frac{\theta - m}{\sigma^2}
.. math:: g \leftarrow \beta_1 g + (1 - \beta_1) \hat g, \quad
          h \leftarrow \beta_2 h + (1 - \beta_2) \hat h
          + \tfrac12 (1 - \beta_2)^2 \frac{(h - \hat h)^2}{h + \delta}, \quad
          m \leftarrow m - \alpha \operatorname{clip}\Bigl(
          \frac{g / (1 - \beta_1^t) + \delta (m - m_0)}{h + \delta}\Bigr)

with the mean loss of a batch in nats per row, one draw of theta in a step. The last term of h keeps h + delta
above zero whatever h-hat is. lambda is how many rows the posterior believes it saw: the number of training
rows is the Bayesian answer, more is a cold posterior; both papers on LoRA take 1e6 and more.

Departures: the prior is centred at the weights m_0 that training starts from, not at zero, which would pull
LoRA's A away from its start. alpha is ``gain`` times the loop's learning rate, so that a rate that is good
for AdamW is good here. The norm of the gradient is not clipped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kilobayes.random import Streams
from kilobayes.tree import clone, map_params, size, spread
from kilobayes.types import Params, Progress


@dataclass(frozen=True, eq=False)
class IVONState:
    """``average`` and ``hessian`` ``(K, ...)``, ``ess`` ``(K,)``: lambda.

    While training also ``momentum`` and, under a prior, its ``center``, both ``(K, ...)``.
    """

    average: Params
    hessian: Params
    ess: Tensor
    momentum: Params
    center: Params


@dataclass(frozen=True)
class IVON:
    """A Gaussian learned while training, by an optimiser that costs what AdamW costs and takes its place.

    Args:
        ess: lambda, rows that the posterior believes it saw; 0 is the number of training rows.
        hessian: what h starts from, in nats per squared weight and row.
        weight_decay: delta, the prior's precision over lambda.
        gain: alpha over the learning rate.
        clip: largest absolute value of what alpha multiplies, in units of the weights; 0 never clips.
        beta1, beta2: decay of momentum and of h.

    Raises:
        ValueError: a setting outside its range.
    """

    ess: float = 1e5
    hessian: float = 1e-2
    weight_decay: float = 0.0
    gain: float = 50.0
    clip: float = 0.02
    beta1: float = 0.9
    beta2: float = 0.999

    def __post_init__(self) -> None:
        for name in ("ess", "weight_decay", "clip"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number from 0 up, found {getattr(self, name)}")
        for name in ("hessian", "gain"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, found {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), found {getattr(self, name)}")

    def init(self, theta: Params, gen: torch.Generator) -> IVONState:
        average = clone(theta)
        some = next(iter(average.values()))
        return IVONState(
            average,
            map_params(lambda t: torch.full_like(t, self.hessian), average),
            torch.full((size(average),), float(self.ess), device=some.device),
            map_params(torch.zeros_like, average),
            clone(theta) if self.weight_decay else {},
        )

    def perturb(
        self, state: IVONState, theta: Params, rows: int, streams: Streams, progress: Progress
    ) -> Params:
        ess = self.ess or progress.rows
        return {
            key: theta[key] + self._deviation(h, ess) * streams.normal(h)
            for key, h in sorted(state.hessian.items())
        }

    def update(
        self,
        state: IVONState,
        theta: Params,
        drawn: Params,
        gradients: Params,
        rates: Tensor,
        progress: Progress,
    ) -> IVONState:
        hessian, momentum = {}, {}
        ess, rest = self.ess or progress.rows, 1.0 - self.beta2
        for key, h in state.hessian.items():
            value, rate = theta[key].detach(), rates.view(-1, *[1] * (h.dim() - 1))
            moves = rate != 0  # a member that diverged has rate 0 and gradients that are not numbers
            gradient = torch.where(moves, gradients[key], torch.zeros_like(h))
            total = h + self.weight_decay
            found = gradient * (drawn[key].detach() - value) * ess  # h-hat over h + delta
            change = rest * (found - h / total)
            # the same sum as above, in the form in which no rounding makes h + delta negative
            hessian[key] = torch.where(moves, total * (1.0 + change + 0.5 * change**2) - self.weight_decay, h)
            momentum[key] = torch.where(
                moves, torch.lerp(gradient, state.momentum[key], self.beta1), state.momentum[key]
            )
            slope = momentum[key] / (1.0 - self.beta1**progress.step)
            if self.weight_decay:
                slope = slope + self.weight_decay * (value - state.center[key])
            step = slope / (hessian[key] + self.weight_decay)
            if self.clip:
                step = step.clamp(-self.clip, self.clip)
            value.sub_(self.gain * rate * step)
        return replace(state, hessian=hessian, momentum=momentum)

    def observe(self, state: IVONState, theta: Params, progress: Progress) -> IVONState:
        if not progress.done:
            return state
        ess = torch.full_like(state.ess, self.ess or progress.rows)
        return IVONState(clone(theta), state.hessian, ess, {}, {})

    def _deviation(self, hessian: Tensor, ess: float | Tensor) -> Tensor:
        return (ess * (hessian + self.weight_decay)).rsqrt()

    def sample(self, state: IVONState, n: int, gen: torch.Generator) -> Params:
        who = spread(size(state.average), n)
        theta: Params = {}
        for key, average in sorted(state.average.items()):  # files sort keys; draws must not depend on it
            ess = state.ess[who].view(-1, *[1] * (average.dim() - 1))
            noise = torch.randn(n, *average.shape[1:], generator=gen)  # on the CPU, whatever the device
            theta[key] = average[who] + self._deviation(state.hessian[key][who], ess) * noise.to(average)
        return theta

    def mean(self, state: IVONState) -> Params:
        return state.average

    def support(self, state: IVONState) -> None:
        return None
