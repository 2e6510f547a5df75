r"""MonteCLoRA: Monte-Carlo enhanced low-rank adaptation, Seth et al., arXiv:2411.04358.

A leaf ``A`` of m rows and n columns (LoRA's A: m = r, n = d_in) is trained under noise whose scale by row, s,
and whose weights, a, are trained too, by the task's loss through the noise and by Kullback-Leibler
divergences:

.. math:: A_\text{eff} = A + \sum_{k=1}^{N_s} \pi_k z_k, \qquad
          z_k = \tau\, \Sigma^{1/2} Z_k, \quad Z_k \sim N(0, 1)^{m \times n}, \qquad
          \tau = \epsilon / \sqrt{3 n}
.. math:: \Sigma = \operatorname{diag} W, \quad W \sim \text{Wishart}(\nu, V / \nu), \quad
          V = \operatorname{diag} e^{2 s}, \quad \nu = m \ (\text{at most } 64)
.. math:: \pi = \operatorname{softmax}(a + e^{-a/2} \xi), \quad \xi \sim N(0, I): \qquad
          \text{the Laplace bridge of Dirichlet}(\alpha), \ \alpha = e^a

What is added to a member's loss, in nats per row, over L leaves and N training rows:

.. math:: \frac{\eta}{N} \sum_\text{leaves} (K_D + K_W + K_N)
          + \frac{c}{L} \sum_\text{leaves} \mathbb{E} \sum_k \pi_k^2
.. math:: K_D = \ln\Gamma(\alpha_+) - \sum_k \ln\Gamma(\alpha_k) - \ln\Gamma(N_s \alpha_0)
          + N_s \ln\Gamma(\alpha_0) + \sum_k (\alpha_k - \alpha_0)(\psi(\alpha_k) - \psi(\alpha_+))
.. math:: K_W = \tfrac{\nu}{2} \sum_i (v_i - \ln v_i - 1), \qquad
          K_N = \tfrac{N_s}{2} \sum_i \mathbb{E} (\Sigma_{ii} - \ln \Sigma_{ii} - 1), \qquad v_i = e^{2 s_i}

where :math:`\mathbb{E} \ln \Sigma_{ii} = \ln v_i + \psi(\nu/2) + \ln(2/\nu)`, c = 1 if cooperative, and
:math:`\mathbb{E} \sum \pi_k^2 = (\sum \alpha_k^2 + \alpha_+) / (\alpha_+^2 + \alpha_+)`.

The weighted sum of N_s draws is, given pi and Sigma, one draw of standard deviation ``tau |pi| Sigma^(1/2)``:
that is how it is drawn, at an N_s-th of the numbers. Its variance is the components' times the sum of
pi_k^2, about 1/N_s. A *true* mixture, one component by pi, of components that share Sigma is one Gaussian
whatever pi is: ``components=1``. With ``mixture=True`` each component therefore has scales s_k of its own,
one component is drawn, and

.. math:: \operatorname{Cov}(A_\text{eff}\ \text{column}) = \tau^2 \sum_k \mathbb{E}[\pi_k]
          \operatorname{diag} e^{2 s_k}

(the gradient in a is straight-through). K_W and K_N are then sums over the components, once each.

Departures from the paper and its two implementations: the scale of the Wishart is V / nu, so that E Sigma = V
and both K_W and K_N are least at s = 0 (with scale V they pull s to 0 and to -log(nu)/2); divergences are
expectations instead of draws, and summed over leaves at the weight 1/N of a bound (K_N counts one column, as
published: a bound would count all n); epsilon is applied once and is relative to the standard deviation
1/sqrt(3 n) with which LoRA's A starts, so that it means the same at every width; the bridge's whole
covariance, not its diagonal; Sigma is not clipped from below; and predictions average over draws of Sigma,
pi and z, where published code predicts at A.

Published noise is about 0.02 of LoRA's initial standard deviation; here it is ``epsilon |pi|``, 1.2 at first.
PEFT's epsilon e, with a Wishart of scale I, is ``epsilon = e sqrt(3 n r)``, and its eta h, a weight of the
mean over L layers, ``eta = h N / L``. So for r = 16, n = 4096, 64 layers and 640 rows
``MonteCLoRA(components=8, epsilon=0.044, eta=0.0001, alpha0=0.1, cooperative=False, speed=1.0)``; its
predictions are those at ``mean``. With hundreds of rows, not many thousands, eta = 1 holds s near 0:
the size of the noise is epsilon's doing, and a's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kilobayes.posteriors import divergences
from kilobayes.random import Streams
from kilobayes.tree import chosen, clone, member, size, spread
from kilobayes.types import Params, Progress


@dataclass(frozen=True, eq=False)
class MonteCLoRAState:
    """``theta`` ``(K, ...)`` and the posterior's ``own`` leaves: ``key~s`` ``(K, m)`` (of a mixture
    ``(K, N_s, m)``) and ``key~a`` ``(K, N_s)``."""

    theta: Params
    own: Params


@dataclass(frozen=True)
class MonteCLoRA:
    """Weights under noise whose Wishart scales and Dirichlet weights are learned along with them.

    Args:
        over: glob of the leaves under noise, as in ``"*/B"``; "" is every A.
        components: N_s.
        epsilon: noise at s = 0 relative to the standard deviation with which LoRA's A starts.
        eta: weight of the divergences relative to a bound.
        alpha0: concentration of the Dirichlet prior, and of the start.
        cooperative: whether to penalise uneven weights.
        mixture: draw one component of its own scales instead of averaging.
        noise: "step" for one draw a step, as published; "row" for a draw of its own for each row.
        speed: learning rate of s and a relative to that of the weights.

    Raises:
        ValueError: a setting outside its range.
    """

    over: str = ""
    components: int = 4
    epsilon: float = 2.0
    eta: float = 1.0
    alpha0: float = 1.0
    cooperative: bool = True
    mixture: bool = False
    noise: str = "step"
    speed: float = 10.0

    def __post_init__(self) -> None:
        if self.components < 1:
            raise ValueError(f"components must be at least 1, found {self.components}")
        if self.noise not in ("step", "row"):
            raise ValueError(f"noise must be step or row, found {self.noise!r}")
        for name in ("epsilon", "alpha0", "speed"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, found {getattr(self, name)}")
        if not 0.0 <= self.eta < math.inf:
            raise ValueError(f"eta must be a number from 0 up, found {self.eta}")

    def extend(self, theta: Params, streams: Streams) -> Params:
        own: Params = {}
        for key in chosen(theta, self.over):
            leaf = theta[key]
            scales = (self.components, rows_of(leaf)) if self.mixture else (rows_of(leaf),)
            own[f"{key}~s"] = leaf.new_zeros(len(leaf), *scales)
            if self.components > 1:  # a single one has no weight to learn
                own[f"{key}~a"] = leaf.new_full((len(leaf), self.components), math.log(self.alpha0))
        return own

    def rates(self, theta: Params) -> dict[str, float]:
        return dict.fromkeys(_apart(theta)[1], self.speed)

    def init(self, theta: Params, gen: torch.Generator) -> MonteCLoRAState:
        return MonteCLoRAState(*_apart(clone(theta)))

    def observe(self, state: MonteCLoRAState, theta: Params, progress: Progress) -> MonteCLoRAState:
        return MonteCLoRAState(*_apart(clone(theta))) if progress.done else state

    def perturb(
        self, state: MonteCLoRAState, theta: Params, rows: int, streams: Streams, progress: Progress
    ) -> Params:
        if self.noise == "row":
            theta = {key: value.repeat_interleave(rows, dim=0) for key, value in theta.items()}
        leaves, own = _apart(theta)
        like = _concentrations(own).new_empty(size(theta), sum(self._sizes(leaves, own)))
        return self._at(leaves, own, streams.normal(like))

    def sample(self, state: MonteCLoRAState, n: int, gen: torch.Generator) -> Params:
        who = spread(size(state.theta), n)
        noise = torch.randn(n, sum(self._sizes(state.theta, state.own)), generator=gen)
        return self._at(member(state.theta, who), member(state.own, who), noise)

    def penalty(self, state: MonteCLoRAState, theta: Params, progress: Progress) -> Tensor:
        leaves, own = _apart(theta)
        keys = _keys(own)
        a = _concentrations(own).double()
        s = torch.cat([own[f"{key}~s"] for key in keys], dim=-1).double()
        nu = torch.tensor([degrees(leaves[key]) for key in keys for _ in range(rows_of(leaves[key]))]).to(s)
        count = 1 if self.mixture else self.components  # a mixture's scales are one set for each component
        scales = (divergences.wishart(s, nu) + count * divergences.normal(s, nu)).flatten(1).sum(dim=1)
        loss = self.eta / progress.rows * (divergences.dirichlet(a, self.alpha0).sum(dim=1) + scales)
        if self.cooperative:
            loss = loss + divergences.collision(a).mean(dim=1)
        return loss.to(leaves[keys[0]].dtype)

    def mean(self, state: MonteCLoRAState) -> Params:
        return state.theta

    def support(self, state: MonteCLoRAState) -> None:
        return None

    def _sizes(self, leaves: Params, own: Params) -> list[int]:
        """Normal numbers of a draw, of each leaf: for pi and the choice of a component, for Sigma, for z."""
        each = [leaves[key] for key in _keys(own)]
        three = [(self.components + 1, rows_of(leaf) * degrees(leaf), leaf[0].numel()) for leaf in each]
        return [number for numbers in three for number in numbers]

    def _at(self, leaves: Params, own: Params, noise: Tensor) -> Params:
        """Leaves ``(n, ...)`` at standard normal ``(n, numbers)``, used in the order of sorted keys."""
        keys = _keys(own)
        rows = [rows_of(leaves[key]) for key in keys]
        a = _concentrations(own)
        parts = noise.to(a).split(self._sizes(leaves, own), dim=1)
        xi = torch.stack(parts[::3], dim=1)
        pi = weights(a, xi[..., :-1])
        scales = torch.cat([own[f"{key}~s"] for key in keys], dim=-1).exp()  # (n, all rows)
        of_row = [index for index, m in enumerate(rows) for _ in range(m)]
        if self.mixture:
            picked = (pi.cumsum(dim=-1) < torch.special.ndtr(xi[..., -1:])).sum(dim=-1)
            hot = torch.nn.functional.one_hot(picked.clamp(max=self.components - 1), self.components)
            scales = ((hot + pi - pi.detach())[:, of_row] * scales.mT).sum(dim=-1)
        else:
            scales = pi.norm(dim=-1)[:, of_row] * scales
        gammas = [part.unflatten(1, (m, -1)).square().mean(dim=-1) for part, m in zip(parts[1::3], rows)]
        deviations = (scales * torch.cat(gammas, dim=1).sqrt()).split(rows, dim=1)
        out = dict(leaves)
        for key, deviation, z in zip(keys, deviations, parts[2::3]):
            leaf = leaves[key].reshape(*deviation.shape, -1)
            tau = self.epsilon / math.sqrt(3 * leaf.shape[2])
            out[key] = torch.addcmul(leaf, deviation[..., None], z.reshape(leaf.shape), value=tau)
            out[key] = out[key].view(leaves[key].shape)
        return out


def weights(a: Tensor, xi: Tensor) -> Tensor:
    """pi of Dirichlet(exp a) by the Laplace bridge, at standard normal numbers: ``(..., N_s)``.

    The bridge's Gaussian sums to zero, that is its covariance is that of ``exp(-a/2) xi`` with the mean over
    components taken off, which softmax does not see.
    """
    return (a + (-0.5 * a).exp() * xi).softmax(dim=-1)


def rows_of(leaf: Tensor) -> int:
    """m of a leaf ``(S, m, ...)``; ``(S, n)`` is one row of n."""
    return leaf.shape[1] if leaf.dim() > 2 else 1


def degrees(leaf: Tensor) -> int:
    """nu of a leaf: m, and no more than 64, beyond which Sigma hardly varies and drawing it costs m^2."""
    return min(rows_of(leaf), 64)


def _keys(own: Params) -> list[str]:
    return sorted(key[:-2] for key in own if key.endswith("~s"))


def _concentrations(own: Params) -> Tensor:
    """ln alpha ``(S, L, N_s)`` of the leaves in the order of :func:`_keys`."""
    some = next(iter(own.values()))
    return torch.stack([own.get(f"{key}~a", some.new_zeros(len(some), 1)) for key in _keys(own)], dim=1)


def _apart(theta: Params) -> tuple[Params, Params]:
    """The adapter's leaves, and the posterior's own."""
    own = {key: value for key, value in theta.items() if key.endswith(("~a", "~s"))}
    return {key: value for key, value in theta.items() if key not in own}, own
