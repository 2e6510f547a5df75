"""The prior's precision of lowest NLL when weights are sampled, for models that cannot be linearised."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from kilobayes.posteriors import ask
from kilobayes.posteriors.linearised import hessian_root
from kilobayes.posteriors.temperature import best_temperature
from kilobayes.protocols import Energy, Jacobian, SamplesLabels
from kilobayes.search import vertex
from kilobayes.types import Params, Posterior

DRAWS = 8
DECADES = range(-2, 9)  # precisions of the prior, as powers of ten
WORST = 1e6  # nats of scores that overflowed


def derivatives(
    energy: Energy, theta: Params, keys: Sequence[str], gen: torch.Generator
) -> Iterator[Jacobian]:
    """Rows' derivatives whose outer products sum to the Gauss-Newton matrix: exact, or at sampled labels."""
    if isinstance(energy, SamplesLabels):
        return energy.sampled(theta, keys, gen)
    return energy.jacobians(theta, keys, hessian_root)


def validated(
    posterior: Posterior, at: Callable[[float], Any], energy: Energy, gen: torch.Generator, tempered: bool
) -> float:
    """The precision of lowest NLL of the averaged probabilities.

    Decades first, then thirds of a decade around the best, then the vertex of a parabola.

    Args:
        at: the posterior's state at a precision; every one is drawn from with the same noise.
        tempered: after the best temperature for each precision, not as they are.
    """
    known: dict[int, float] = {}
    noise, own = gen.get_state(), energy.labels

    def loss(third: int) -> float:
        if third not in known:
            fresh = torch.Generator().set_state(noise)
            scores = energy.logits(ask.draws(posterior, at(10.0 ** (third / 3)), energy, DRAWS, fresh))
            if not scores.isfinite().all():
                known[third] = WORST
            else:
                scores = scores / best_temperature(scores.double(), own) if tempered else scores
                logs = scores.log_softmax(dim=-1)
                picked = logs.gather(-1, own.expand(len(logs), -1)[..., None])[..., 0].double()
                known[third] = float(math.log(len(logs)) - picked.logsumexp(dim=0).mean())
        return known[third]

    best = 3 * min(DECADES, key=lambda decade: loss(3 * decade))
    near = [best + step for step in (-2, -1, 0, 1, 2)]
    return 10.0 ** (vertex([float(t) for t in near], [loss(t) for t in near])[0] / 3)
