r"""Laplace's approximation of an adapter's posterior: Laplace-LoRA, Yang et al., arXiv:2308.13111.

With the linearised predictive and the prior's precision of Daxberger et al., arXiv:2106.14806:

.. math:: q(\theta) = N\bigl(\theta^*, (F + \lambda I)^{-1}\bigr), \qquad
          f(x) \sim N\bigl(f_{\theta^*}(x),\; J(x) (F + \lambda I)^{-1} J(x)^\top\bigr), \qquad
          p(y \mid x) = \frac1S \sum_s \operatorname{softmax}(f_s(x))_y

F is the generalised Gauss-Newton matrix of the training rows' log-likelihood, a sum, at the trained weights;
see :mod:`kilobayes.posteriors.gauss_newton` for its structures. lambda, in nats per squared weight, is that
of the isotropic prior around the initial weights theta_0, and is

* ``"validation"``: of lowest NLL of the linearised predictive on calibration rows, or
* ``"evidence"``: of largest :math:`-\frac\lambda2 \lVert\theta^* - \theta_0\rVert^2
  - \frac12 \log\lvert I + F / \lambda\rvert` (the log-likelihood at theta* does not depend on it), or
* a number: training then adds :math:`\frac{\lambda}{2N} \lVert\theta - \theta_0\rVert^2` to the loss.

Departures: derivatives are those of rows, exact for any adapter and leaf, where KFAC sums over tokens,
padding included in the published code; the prior is centred where training starts, since LoRA's A starts away
from zero; scores are drawn per row jointly over its classes, and differences of scores are what is
differentiated, C - 1 backward passes. Probabilities are averaged, never scores. For a language model, whose
classes are its vocabulary, F is estimated from sampled labels (:mod:`kilobayes.lm.energy`), weights are
sampled, never linearised, and validation runs sampled weights for each precision."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from kilobayes import tree
from kilobayes.posteriors import ask, by_draws, linearised
from kilobayes.posteriors.curvature import Curvature, curvature_of
from kilobayes.posteriors.gauss_newton import LARGEST, gauss_newton
from kilobayes.protocols import Energy, SamplesLabels
from kilobayes.tree import clone, map_params, member, size, spread
from kilobayes.types import Params, Progress


@dataclass(frozen=True, eq=False)
class LaplaceState:
    """``theta`` ``(K, ...)``; ``center``: the prior's until the fit, zero where empty; ``left``, ``right``,
    ``values``: the curvature of each member; ``precision`` ``(K,)``: lambda, infinite until the fit."""

    theta: Params
    center: Params
    left: Params
    right: Params
    values: Params
    precision: Tensor


@dataclass(frozen=True)
class Laplace:
    """A Gaussian around the trained weights, as wide as the training rows' curvature and a prior allow.

    Args:
        over: the leaves that are uncertain: a glob, ``"head"``, ``"*"`` for all.
        structure: of the curvature: ``"kron"``, ``"diag"`` or ``"full"``.
        rank: eigenvectors kept of a wide side of a Kronecker product.
        prior: its precision: ``"validation"``, ``"evidence"`` or a number.
        tempered: validate after the best temperature for each precision: for ``Temperature(Laplace())``.
        linearised: predict with scores linear in the weights; else run sampled weights.
        samples: draws of linearised scores, which cost next to nothing, if fewer are asked for.

    Raises:
        ValueError: a setting outside its range; when training starts, no such leaves, or too many for a full
            matrix.
    """

    over: str = "*"
    structure: str = "kron"
    rank: int = 10
    prior: str | float = "validation"
    tempered: bool = False
    linearised: bool = True
    samples: int = 100

    def __post_init__(self) -> None:
        if self.structure not in ("kron", "diag", "full"):
            raise ValueError(f"structure is 'kron', 'diag' or 'full', found {self.structure!r}")
        if self.rank < 1 or self.samples < 1:
            raise ValueError(f"rank and samples must be at least 1, found {self.rank} and {self.samples}")
        if isinstance(self.prior, str) and self.prior not in ("validation", "evidence"):
            raise ValueError(f"prior is 'validation', 'evidence' or a number, found {self.prior!r}")
        if not isinstance(self.prior, str) and not 0.0 < self.prior < math.inf:
            raise ValueError(f"a prior's precision must be above 0, found {self.prior}")

    @property
    def calibrates(self) -> bool:
        return self.prior == "validation"

    def init(self, theta: Params, gen: torch.Generator) -> LaplaceState:
        own = {key: theta[key] for key in self.keys(theta)}
        if self.structure == "full" and tree.numbers(own) > LARGEST:
            raise ValueError(
                f"a full matrix over {tree.numbers(own)} numbers is too large (at most {LARGEST}): "
                "take structure='kron', or fewer leaves, as in over='head'"
            )
        center = {} if self.prior == "validation" else clone(own)
        infinite = torch.full((size(theta),), math.inf)
        return LaplaceState(clone(theta), center, {}, {}, {}, infinite)

    def penalty(self, state: LaplaceState, theta: Params, progress: Progress) -> Tensor:
        some = next(iter(theta.values()))
        if isinstance(self.prior, str):
            return torch.zeros(len(some), device=some.device)
        return self.prior / (2 * progress.rows) * linearised.distance(theta, state.center)

    def observe(self, state: LaplaceState, theta: Params, progress: Progress) -> LaplaceState:
        return replace(state, theta=clone(theta)) if progress.done else state

    def keys(self, theta: Params) -> list[str]:
        """Keys of the leaves that are uncertain."""
        if self.over != "head":
            return tree.chosen(theta, self.over)
        return [
            key for key in tree.chosen(theta, "*") if tree.split_key(key)[1] in ("weight", "bias")
        ] or tree.chosen(theta, "head")

    def fit(self, state: LaplaceState, energy: Energy, gen: torch.Generator) -> LaplaceState:
        members = range(size(state.theta))
        return tree.concatenate_states([self._fit(tree.state_member(state, k), energy, gen) for k in members])

    def _fit(self, state: LaplaceState, energy: Energy, gen: torch.Generator) -> LaplaceState:
        keys = self.keys(state.theta)
        stream = by_draws.derivatives(energy.train, state.theta, keys, gen)
        found = gauss_newton(self.structure, stream, len(energy.train.labels), self.rank, gen)
        if self.prior == "validation" and isinstance(energy, SamplesLabels):
            at = partial(_fitted, state.theta, found)
            precision = by_draws.validated(self, at, energy, gen, self.tempered)
        elif self.prior == "validation":
            draws = self._draws(found, state.theta, linearised.GRID, energy, self.samples, gen)
            precision = linearised.validated(draws, energy.labels, self.tempered)
        elif self.prior == "evidence":
            center = state.center or {key: torch.zeros_like(state.theta[key]) for key in keys}
            precision = linearised.most_evident(found, float(linearised.distance(state.theta, center)))
        else:
            precision = float(self.prior)
        return _fitted(state.theta, found, precision)

    def _draws(
        self, found: Curvature, theta: Params, grid: Tensor, energy: Energy, n: int, gen: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        stream = energy.jacobians(theta, self.keys(theta), linearised.differences)
        return linearised.draws(found, stream, grid, n, len(energy), gen)

    def logits(self, state: LaplaceState, energy: Energy, n: int, gen: torch.Generator) -> Tensor:
        if not self.linearised or not state.values:
            return energy.logits(ask.draws(self, state, energy, n, gen))
        draws = []
        for k, count in enumerate(tree.shares(size(state.theta), max(n, self.samples))):
            own, theta = state.precision[k : k + 1], member(state.theta, k)
            batches = list(self._draws(curvature_of(state, k), theta, own, energy, count, gen))
            order = torch.cat([rows for rows, _ in batches]).argsort()
            draws.append(torch.cat([scores[0] for _, scores in batches], dim=1)[:, order].float())
        return torch.cat(draws)

    def sample(self, state: LaplaceState, n: int, gen: torch.Generator) -> Params:
        theta = member(state.theta, spread(size(state.theta), n))
        if not state.values:
            return theta
        steps = []
        like = {key: theta[key] for key in self.keys(theta)}
        for k, count in enumerate(tree.shares(size(state.theta), n)):
            noise = {key: torch.randn(1, count, *v.shape[1:], generator=gen) for key, v in like.items()}
            found = curvature_of(state, k)
            blocks = found.root(found.blocks(noise), float(state.precision[k]))
            steps.append(torch.cat([blocks[key].flatten(2)[0] for key in sorted(blocks)], dim=1))
        moved = tree.unflat(torch.cat(steps), like)
        return theta | {key: theta[key] + step.to(theta[key]) for key, step in moved.items()}

    def mean(self, state: LaplaceState) -> Params:
        return state.theta

    def support(self, state: LaplaceState) -> int | None:
        return None if state.values else size(state.theta)


def _fitted(theta: Params, found: Curvature, precision: float) -> LaplaceState:
    left, right, values = (map_params(lambda v: v[None].cpu(), p) for p in found.parts())
    return LaplaceState(theta, {}, left, right, values, torch.tensor([precision]))
