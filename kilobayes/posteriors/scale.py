r"""One number for any posterior: how wide it is, chosen on the calibration rows.

.. math:: \theta = \bar\theta + \sqrt{c}\,(\tilde\theta - \bar\theta), \quad \tilde\theta \sim q,
          \qquad\text{or}\qquad f_s \to \bar f + \sqrt{c}\,(f_s - \bar f)

The first, of weights, multiplies the covariance around each member's own mean: what SWAG calls its scale, the
Laplace approximation its prior, BLoB, IVON and TFB their variance, here found instead of set. The second, of
class scores, is for posteriors that vary in their predictions alone: ensembles of points, and those that
predict in their own way. There c = 0 is the logarithmic pool (the geometric mean of the members'
probabilities) and c = 1 the average of the probabilities; the mean over s is over all draws, and over a
member's own where an ensemble is around.

c has the lowest mean negative log-likelihood (nats) of the averaged probabilities, with the same draws for
every c. Scores are computed at sqrt(c) = 0, 1 and 2, and further up while it pays; a parabola through the
last three, for each draw, row and class, says what they are between; the best c there is then computed, too,
and what comes back is the best of those computed. That Gaussian approximations around a trained network need
such a factor: Wenzel et al., arXiv:2002.02405; that it trades against temperature, so that both are to be
chosen together: ``tempered``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kilobayes.posteriors import ask
from kilobayes.posteriors.point import Point
from kilobayes.posteriors.temperature import Temperature, best_temperature
from kilobayes.posteriors.wrapping import Wrapping
from kilobayes.protocols import Energy, Predicts
from kilobayes.search import between, refined
from kilobayes.tree import member, size, spread
from kilobayes.types import Params, Posterior

DOUBLINGS = 4  # of the widest root of c, which is 2 at first


@dataclass(frozen=True, eq=False)
class ScaleState:
    """``inner``: the wrapped posterior's state; ``factor``: c of each member ``(K,)``."""

    inner: object
    factor: Tensor


@dataclass(frozen=True)
class Scale(Wrapping):
    """The width of any posterior, one number, fitted on the calibration split.

    Args:
        base: the posterior whose width is fitted.
        of: "weights", "scores", or "" for weights where a member varies in them and scores elsewhere.
        tempered: choose the width as it is best together with a temperature, which is then to be fitted
            around it, as ``Temperature(Scale(SWAG()))`` does; no matter where a temperature is inside.
        samples: draws of a continuous posterior that the fit averages over, and at least one of each member.

    Raises:
        ValueError: another ``of``, fewer than one sample, or weights of a posterior that predicts in its own
            way.
    """

    base: Posterior = field(default=Point())
    of: str = ""
    tempered: bool = True
    samples: int = 10
    calibrates = True  # no annotation: not an option

    def __post_init__(self) -> None:
        if self.of not in ("", "weights", "scores"):
            raise ValueError(f"of must be 'weights', 'scores' or '', found {self.of!r}")
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, found {self.samples}")
        if self.of == "weights" and self._predicts:
            raise ValueError(
                f"{type(ask.innermost(self.base)).__name__} predicts in its own way: of='scores'"
            )

    @property
    def _predicts(self) -> bool:
        last = ask.innermost(self.base)
        return isinstance(last, Predicts) or getattr(last, "masks", False)

    def of_scores(self, state: ScaleState) -> bool:
        """Whether the class scores are what is scaled, and not the weights."""
        own = self._predicts or self.base.support(state.inner) is not None
        return self.of == "scores" or (not self.of and own)

    def init(self, theta: Params, gen: torch.Generator) -> ScaleState:
        return ScaleState(self.base.init(theta, gen), torch.ones(size(theta)))

    def fit(self, state: ScaleState, energy: Energy, gen: torch.Generator) -> ScaleState:
        state = super().fit(replace(state, factor=torch.ones_like(state.factor)), energy, gen)
        count = ask.count(self.base, state.inner, max(self.samples, len(state.factor)))
        labels, who = energy.labels, spread(len(state.factor), count)
        scores = self.of_scores(state)
        if scores:
            logits = ask.logits(self.base, state.inner, energy, count, gen)
        else:
            drawn = ask.draws(self.base, state.inner, energy, count, gen)

        def at(root: float) -> Tensor:
            new = replace(state, factor=torch.full_like(state.factor, root**2))
            if scores:
                return self.transform(new, logits).double()
            theta = self._scaled(new, drawn) if root else self.base.mean(state.inner)
            found = self.transform(new, energy.logits(theta)).double()
            return found if root else found[who]

        def loss(found: Tensor) -> float:
            return mixture_nll(found, labels.to(found.device), self._tempered)

        return replace(state, factor=torch.full_like(state.factor, search(at, loss) ** 2))

    @property
    def _tempered(self) -> bool:
        return self.tempered and not any(isinstance(p, Temperature) for p in ask.chain(self.base))

    def _scaled(self, state: ScaleState, drawn: Params) -> Params:
        who = spread(len(state.factor), size(drawn))
        center, theta = member(self.base.mean(state.inner), who), {}
        for key, value in drawn.items():
            c = state.factor[who].to(value).view(-1, *[1] * (value.dim() - 1))
            theta[key] = torch.where(c == 1, value, center[key] + c.sqrt() * (value - center[key]))
        return theta

    def sample(self, state: ScaleState, n: int, gen: torch.Generator) -> Params:
        drawn = self.base.sample(state.inner, n, gen)
        return drawn if self.of_scores(state) else self._scaled(state, drawn)

    def support(self, state: ScaleState) -> int | None:
        still = not self.of_scores(state) and not bool(state.factor.any())
        return len(state.factor) if still else self.base.support(state.inner)

    def transform(self, state: ScaleState, logits: Tensor) -> Tensor:
        logits = ask.transform(self.base, state.inner, logits)
        if not self.of_scores(state):
            return logits
        groups = 1 if ask.members(self.base) > 1 else len(state.factor)
        who, parts = spread(groups, len(logits)), []
        for group in range(groups):
            own = logits[who == group]
            center, c = own.mean(dim=0), float(state.factor[group])
            parts.append(own if c == 1 else center + math.sqrt(c) * (own - center))
        return torch.cat(parts)


def mixture_nll(logits: Tensor, labels: Tensor, tempered: bool) -> float:
    """Mean NLL (nats) of the averaged probabilities, ``logits`` ``(S, N, C)``.

    Args:
        tempered: after the best temperature, not as they are.
    """
    scores = torch.log_softmax(logits / (best_temperature(logits, labels) if tempered else 1.0), dim=-1)
    picked: Any = scores.gather(-1, labels.expand(len(logits), -1)[..., None])[..., 0]
    return float(math.log(len(logits)) - picked.logsumexp(dim=0).mean())


def search(at: Callable[[float], Tensor], loss: Callable[[Tensor], float]) -> float:
    """The root of c with the lowest loss of those computed: 0, 1, 2, further ones, and the best between.

    Args:
        at: the scores at a root.
    """
    nodes = {root: at(root) for root in (0.0, 1.0, 2.0)}
    for _ in range(DOUBLINGS + 1):
        near = sorted(nodes)[-3:]

        def within(root: float, near: list[float] = near) -> float:
            parts = [w * nodes[a] for w, a in zip(between(near, root), near, strict=True)]
            return loss(torch.stack(parts).sum(dim=0))

        grid = [near[0] + (near[2] - near[0]) * cell / 8 for cell in range(9)]
        first = min(range(9), key=lambda cell: within(grid[cell]))
        if first < 8 or len(nodes) == 3 + DOUBLINGS:
            break
        nodes[2 * near[2]] = at(2 * near[2])
    best = refined(within, grid, first, 1e-2)
    if best not in nodes:
        nodes[best] = at(best)
    return min(nodes, key=lambda root: (loss(nodes[root]), abs(root - 1)))
