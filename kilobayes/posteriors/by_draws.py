"""The prior's precision of lowest NLL when weights are sampled, for models that cannot be linearised."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from kilobayes.posteriors.temperature import best_temperature
from kilobayes.search import vertex

DRAWS = 8
DECADES = range(-2, 9)  # precisions of the prior, as powers of ten
WORST = 1e6  # nats of scores that overflowed


def validated(at: Callable[[float], Tensor], labels: Tensor, tempered: bool) -> float:
    """The precision of lowest NLL of the averaged probabilities.

    Decades first, then thirds of a decade around the best, then the vertex of a parabola.

    Args:
        at: scores ``(n, N, C)`` at a precision, with the same noise for each.
        tempered: after the best temperature for each precision, not as they are.
    """
    known: dict[int, float] = {}

    def loss(third: int) -> float:
        if third not in known:
            scores = at(10.0 ** (third / 3))
            own = labels.to(scores.device)
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
