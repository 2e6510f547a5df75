"""When to collect weights late in training, and at which learning rate: shared by SWA and SWAG."""

from __future__ import annotations

from collections.abc import Callable

from kilobayes.types import Progress


def check(start: float, snapshots: int, rate_held: float, anneal: float) -> None:
    """Refuse settings outside their range.

    Raises:
        ValueError: a setting outside its range.
    """
    if not 0.0 <= start < 1.0:
        raise ValueError(f"start is a fraction of training in [0, 1), found {start}")
    if snapshots < 1:
        raise ValueError(f"snapshots must be at least 1, found {snapshots}")
    if not 0.0 < rate_held < float("inf"):
        raise ValueError(f"rate_held must be above 0, found {rate_held}")
    if not 0.0 <= anneal <= 1.0 - start + 1e-9:  # 1 - 0.9 is a little less than 0.1
        raise ValueError(
            f"anneal is a fraction of training, at most 1 - start = {1 - start:g}, found {anneal}"
        )


def first(steps: int, start: float) -> int:
    """Steps before the tail; the last step always belongs to it, however late it starts."""
    return min(round(start * steps), steps - 1)


def due(progress: Progress, start: float, snapshots: int, by_epoch: bool) -> bool:
    """Whether to collect after this step: evenly over the tail, last step included, or at its epochs' ends.

    A tail of fewer steps than ``snapshots`` gives one snapshot a step.
    """
    before = first(progress.steps, start)
    if progress.step <= before:
        return False
    if by_epoch:
        return progress.epoch_ended
    tail, done = progress.steps - before, progress.step - before
    return done * snapshots // tail > (done - 1) * snapshots // tail


def rate(progress: Progress, own: Callable[[int], float], start: float, held: float, anneal: float) -> float:
    """The loop's own rate until ``start``, then linearly over ``anneal`` (or at once) to ``held``.

    Args:
        progress: of the step to come.
        own: the loop's rate at a step, from 1; like ``held`` relative to the peak.
    """
    before = first(progress.steps, start)
    if progress.step <= before:
        return own(progress.step)
    length = anneal * progress.steps
    share = min(1.0, (progress.step - before) / length) if length > 0 else 1.0
    return (1.0 - share) * own(max(before, 1)) + share * held
