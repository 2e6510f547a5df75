"""Stratified splits: proportions, both sides of small classes, determinism."""

from __future__ import annotations

import numpy as np
import pytest

from kilobayes.errors import KilobayesError
from kilobayes.tasks.split import stratified_holdout


def held_counts(labels: list[int], how: float | int, seed: int = 0) -> list[int]:
    train, held = stratified_holdout(labels, how, seed)
    assert sorted([*train, *held]) == list(range(len(labels)))
    assert list(train) == sorted(train)
    assert list(held) == sorted(held)
    return np.bincount(np.asarray(labels)[held], minlength=max(labels) + 1).tolist()


@pytest.mark.parametrize(
    ("sizes", "how", "expected"),
    [
        ([50, 30, 20], 0.1, [5, 3, 2]),
        ([50, 30, 20], 10, [5, 3, 2]),
        ([5, 3, 2], 4, [2, 1, 1]),  # quotas 2.0, 1.2, 0.8
        ([7, 7, 7], 4, [2, 1, 1]),  # equal remainders: the lower class
        ([100, 2], 3, [2, 1]),  # the small class gets its row
        ([100, 2], 99, [98, 1]),  # and keeps one
        ([100, 1], 50, [50, 0]),  # a single row stays in training
        ([100, 1], 100, [99, 1]),  # unless the count cannot spare it
        ([2, 2, 2], 2, [1, 1, 0]),  # too few held out for all
        ([2, 2, 2], 3, [1, 1, 1]),
        ([1, 1, 1], 2, [1, 1, 0]),
    ],
)
def test_counts_by_hand(sizes: list[int], how: float | int, expected: list[int]) -> None:
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    assert held_counts(labels, how) == expected


def test_guarantees_hold_on_random_classes() -> None:
    rng = np.random.default_rng(5)
    for seed in range(200):
        sizes = rng.integers(1, 12, size=rng.integers(2, 8))
        labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes)).tolist()
        total = int(rng.integers(1, len(labels)))
        counts = np.array(held_counts(labels, total, seed))
        assert counts.sum() == total
        pairs = sizes >= 2
        if pairs.sum() <= total <= len(labels) - len(sizes):
            assert (counts[pairs] >= 1).all()
            assert (counts < sizes).all()
        quota = total * sizes / sizes.sum()
        moved = max(0, int(pairs.sum()))
        assert np.abs(counts - quota).max() <= 1 + moved


def test_seed_decides_which_rows_and_nothing_else_does() -> None:
    labels = [0, 1] * 50
    np.random.seed(1)  # noqa: NPY002 - the global generator must not matter
    first = stratified_holdout(labels, 0.3, 7)[1]
    np.random.seed(2)  # noqa: NPY002
    assert np.array_equal(first, stratified_holdout(np.array(labels), 0.3, 7)[1])
    assert not np.array_equal(first, stratified_holdout(labels, 0.3, 8)[1])


@pytest.mark.parametrize("how", [0, 4, -1, 0.0, 1.0, float("nan")])
def test_an_empty_side_is_an_error(how: float | int) -> None:
    with pytest.raises(KilobayesError, match=r"cannot hold out .* of 4 rows"):
        stratified_holdout([0, 0, 1, 1], how, 0)
