"""When to collect weights late in training, and at which learning rate: shared by SWA and SWAG."""

from __future__ import annotations

from kilobayes.types import Progress


def check(start: float, snapshots: int, rate: float, anneal: float) -> None:
    """Raises:
    ValueError: a setting outside its range.
    """
    if not 0.0 <= start < 1.0:
        raise ValueError(f"start is a fraction of training in [0, 1), found {start}")
    if snapshots < 1:
        raise ValueError(f"snapshots must be at least 1, found {snapshots}")
    if rate <= 0.0:
        raise ValueError(f"rate must be above 0, found {rate}")
    if not 0.0 <= anneal <= 1.0 - start:
        raise ValueError(f"anneal is a fraction of training, at most 1 - start = {1 - start:g}, found {anneal}")


def due(progress: Progress, start: float, snapshots: int, by_epoch: bool) -> bool:
    """Whether to collect after this step: evenly over the tail, its last step included, or at its epochs' ends."""
    first = round(start * progress.steps)
    if progress.step <= first:
        return False
    if by_epoch:
        return progress.epoch_ended
    tail = progress.steps - first
    done, before = progress.step - first, progress.step - first - 1
    return done * snapshots // tail > before * snapshots // tail


def rate(progress: Progress, default: float, start: float, held: float, anneal: float) -> float:
    """The loop's own rate until ``start``, then linearly over ``anneal`` (or at once) to ``held``, kept to the end.

    ``progress`` is that of the step to come; both rates are relative to the peak.
    """
    if progress.fraction <= start:
        return default
    if anneal <= 0.0:
        return held
    # linear from the rate at which the loop's own schedule stands at the start of the tail
    share = min(1.0, (progress.fraction - start) / anneal)
    return default + share * (held - default)
