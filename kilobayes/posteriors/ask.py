"""Asking a posterior for an optional protocol, with what holds where it does not offer it.

Wrapping posteriors delegate through these functions, so any wraps any.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kilobayes.random import Streams
from kilobayes.types import Energy, Fits, Params, Posterior, Progress, Schedules, Trains, Transforms


def members(posterior: Posterior) -> int:
    """How many members the posterior trains: 1, or an ensemble's."""
    return getattr(posterior, "members", None) or (
        members(posterior.base) if hasattr(posterior, "base") else 1
    )


def objective(
    posterior: Posterior,
    state: Any,
    theta: Params,
    nll: Callable[[Params], Tensor],
    streams: Streams,
    progress: Progress,
) -> Tensor:
    """Loss of each member ``(S,)`` in nats per row; the mean NLL unless the posterior says more."""
    if isinstance(posterior, Trains):
        return posterior.objective(state, theta, nll, streams, progress)
    return nll(theta).mean(dim=1)


def rate(posterior: Posterior, progress: Progress, own: Callable[[int], float]) -> float:
    """Learning rate relative to its peak; the loop's own of that step unless the posterior schedules it."""
    return posterior.rate(progress, own) if isinstance(posterior, Schedules) else own(progress.step)


def fit(posterior: Posterior, state: Any, energy: Energy, gen: torch.Generator) -> Any:
    """The state after what is fitted once after training."""
    return posterior.fit(state, energy, gen) if isinstance(posterior, Fits) else state


def transform(posterior: Posterior, state: Any, logits: Tensor) -> Tensor:
    """Class scores ``(S, N, C)`` as the posterior wants them."""
    return posterior.transform(state, logits) if isinstance(posterior, Transforms) else logits


def needs_calibration(posterior: Posterior) -> bool:
    """Whether the posterior, or one that it wraps, is fitted on a calibration split."""
    if hasattr(posterior, "base"):
        return getattr(posterior, "calibrates", False) or needs_calibration(posterior.base)
    return isinstance(posterior, Fits)
