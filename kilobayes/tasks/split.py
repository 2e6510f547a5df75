"""Stratified splits that depend on nothing but the labels and a seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kilobayes.errors import KilobayesError


def stratified_holdout(
    labels: Sequence[int] | np.ndarray, fraction_or_count: float | int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Holds out rows, each class in proportion to its size.

    The held-out count of class c starts from the floor of ``count * n_c / n``; the rows still missing go to
    the classes with the largest remainders (ties to the lower class). Then, where the counts allow it, every
    class of two or more rows gets at least one row on each side; a class of a single row stays in training
    unless the count needs it.

    Args:
        labels: class indices ``(N,)``.
        fraction_or_count: a float in (0, 1) is a share of the rows (rounded), an int a number of
            rows in [1, N - 1].
        seed: seed of the draw.

    Returns:
        ``(train, held)``: ascending row indices, disjoint, together all rows.

    Raises:
        KilobayesError: when nothing would be left on one side.
    """
    labels = np.asarray(labels)
    n = len(labels)
    share = isinstance(fraction_or_count, float)
    held_rows = (
        round(fraction_or_count * n) if share and np.isfinite(fraction_or_count) else fraction_or_count
    )
    held_rows = max(int(held_rows), 1) if share and 0 < fraction_or_count < 1 else held_rows
    if not (isinstance(held_rows, int | np.integer) and 0 < held_rows < n):
        raise KilobayesError(
            f"cannot hold out {fraction_or_count} of {n} rows",
            "both sides need at least one row",
            f"give a share between 0 and 1 or a count from 1 to {max(n - 1, 1)}",
        )
    classes, sizes = np.unique(labels, return_counts=True)
    counts = _allocate(sizes, int(held_rows))
    rng = np.random.default_rng(seed)
    held = [rng.permutation(np.flatnonzero(labels == c))[:k] for c, k in zip(classes, counts)]
    chosen = np.zeros(n, dtype=bool)
    chosen[np.concatenate(held)] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def _allocate(sizes: np.ndarray, total: int) -> np.ndarray:
    """Rows to take from each class: largest remainder, then one row on each side where possible."""
    quota = total * sizes / sizes.sum()
    counts = np.floor(quota).astype(int)
    order = np.argsort(-(quota - counts), kind="stable")
    counts[order[: total - counts.sum()]] += 1

    splittable = sizes >= 2
    low = np.where(splittable, 1, 0)  # rows wanted among the held-out
    high = np.where(splittable, sizes - 1, 0)  # and no more than this, so that training keeps one
    while True:
        short, over = counts < low, counts > high
        if short.any() and (counts > low).any():
            # Taken from the class that lies furthest above its share, so that proportions suffer least.
            give = np.where(over, sizes.sum() + counts, np.where(counts > low, counts - quota, -np.inf))
            counts[int(np.argmax(give))] -= 1
            counts[int(np.argmax(short))] += 1
        elif over.any() and (counts < high).any():
            room = np.where(counts < high, quota - counts, -np.inf)
            counts[int(np.argmax(over))] -= 1
            counts[int(np.argmax(room))] += 1
        else:
            return counts
