"""Asking a posterior for an optional protocol, with what holds where it does not offer it.

Wrapping posteriors delegate through these functions, so any wraps any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kilobayes.protocols import (
    Energy,
    Extends,
    Fits,
    Optimises,
    Penalises,
    Perturbs,
    Predicts,
    Rates,
    Restricts,
    Schedules,
    Transforms,
    Validates,
)
from kilobayes.random import Streams
from kilobayes.tree import map_params, size, spread
from kilobayes.types import Params, Posterior, Progress


def chain(posterior: Posterior) -> Iterator[Any]:
    """The posterior, the one that it wraps, and so on inwards."""
    yield posterior
    if hasattr(posterior, "base"):
        yield from chain(posterior.base)


def innermost(posterior: Posterior) -> Any:
    """The posterior that wraps no other."""
    return list(chain(posterior))[-1]


def members(posterior: Posterior) -> int:
    """How many members the posterior trains: 1, or an ensemble's."""
    return next((p.members for p in chain(posterior) if getattr(p, "members", None)), 1)


def extend(posterior: Posterior, theta: Params, streams: Streams) -> Params:
    """Trainable leaves of the posterior's own; none unless it offers some."""
    return posterior.extend(theta, streams) if isinstance(posterior, Extends) else {}


def perturb(
    posterior: Posterior, state: Any, theta: Params, rows: int, streams: Streams, progress: Progress
) -> Params:
    """The leaves at which a step's likelihood is taken; ``theta`` itself unless the posterior draws."""
    if isinstance(posterior, Perturbs):
        return posterior.perturb(state, theta, rows, streams, progress)
    return theta


def penalty(posterior: Posterior, state: Any, theta: Params, progress: Progress) -> Tensor:
    """What is added to each member's loss ``(S,)``, nats per row; zero unless the posterior says more."""
    if isinstance(posterior, Penalises):
        return posterior.penalty(state, theta, progress)
    some = next(iter(theta.values()))
    return torch.zeros(len(some), device=some.device)


def optimises(posterior: Posterior) -> bool:
    """Whether the posterior moves the weights itself."""
    return isinstance(innermost(posterior), Optimises)


def update(
    posterior: Any,
    state: Any,
    theta: Params,
    drawn: Params,
    gradients: Params,
    rates: Tensor,
    progress: Progress,
) -> Any:
    """A step of a posterior that :func:`optimises`."""
    return posterior.update(state, theta, drawn, gradients, rates, progress)


def rates(posterior: Posterior, theta: Params) -> dict[str, float]:
    """Factors of the learning rate by key; 1 where absent."""
    return posterior.rates(theta) if isinstance(posterior, Rates) else {}


def rate(posterior: Posterior, progress: Progress, own: Callable[[int], float]) -> float:
    """Learning rate relative to its peak; the loop's own of that step unless the posterior schedules it."""
    return posterior.rate(progress, own) if isinstance(posterior, Schedules) else own(progress.step)


def validates(posterior: Posterior) -> bool:
    """Whether the posterior looks at calibration rows while training."""
    return isinstance(innermost(posterior), Validates)


def validate(posterior: Posterior, state: Any, theta: Params, progress: Progress, energy: Energy) -> Any:
    """The state after an epoch's look at the calibration rows."""
    return posterior.validate(state, theta, progress, energy) if isinstance(posterior, Validates) else state


def fit(posterior: Posterior, state: Any, energy: Energy, gen: torch.Generator) -> Any:
    """The state after what is fitted once after training."""
    return posterior.fit(state, energy, gen) if isinstance(posterior, Fits) else state


def count(posterior: Posterior, state: Any, samples: int) -> int:
    """Draws to take: ``samples`` and one of each member at least, or all there are of a finite posterior."""
    return posterior.support(state) or max(samples, members(posterior))


def logits(posterior: Posterior, state: Any, energy: Energy, n: int, gen: torch.Generator) -> Tensor:
    """Class scores ``(n, N, C)`` of n draws, or more, on the rows of ``energy``, before :func:`transform`.

    Linearised scores have at least as many draws as their posterior says: they cost next to nothing.
    """
    if isinstance(posterior, Predicts):
        return posterior.logits(state, energy, n, gen)
    return energy.logits(draws(posterior, state, energy, n, gen))


def draws(posterior: Posterior, state: Any, energy: Energy, n: int, gen: torch.Generator) -> Params:
    """``n`` draws ``(n, ...)`` as the model's adapter allows them: a sparse one stays on its support."""
    return restricted(energy, posterior.sample(state, n, gen), posterior.mean(state))


def restricted(energy: Energy, drawn: Params, mean: Params) -> Params:
    """Draws ``(n, ...)`` spread around means ``(K, ...)``, with what the energy's adapter keeps of these."""
    if not isinstance(energy, Restricts):
        return drawn
    who = spread(size(mean), size(drawn))
    return energy.restrict(drawn, map_params(lambda t: t[who.to(t.device)], mean))


def transform(posterior: Posterior, state: Any, logits: Tensor) -> Tensor:
    """Class scores ``(S, N, C)`` as the posterior wants them."""
    return posterior.transform(state, logits) if isinstance(posterior, Transforms) else logits


def predictive(
    posterior: Posterior, state: Any, energy: Energy, samples: int, gen: torch.Generator
) -> Tensor:
    """Class scores ``(S, N, C)`` whose probabilities are to be averaged: draws, transformed."""
    drawn = logits(posterior, state, energy, count(posterior, state, samples), gen)
    return transform(posterior, state, drawn)


def needs_calibration(posterior: Posterior) -> bool:
    """Whether the posterior, or one that it wraps, needs rows that are not trained on."""
    return any(getattr(p, "calibrates", False) for p in chain(posterior))
