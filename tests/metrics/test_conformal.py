"""Sets and thresholds against written-out definitions, and what they promise on exchangeable rows."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
from scipy.stats import binom

from kilobayes.errors import KilobayesError
from kilobayes.metrics import conformal
from kilobayes.metrics.conformal import Calibration

pytest.importorskip("mapie")


def rows(count: int, seed: int, classes: int = 4, power: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, and labels drawn from them raised to a power: overconfident below 1."""
    gen = np.random.default_rng(seed)
    probs = gen.dirichlet(np.full(classes, 0.3), count).astype(np.float32)
    probs /= probs.sum(axis=1, keepdims=True)
    truth = (probs + 1e-6) ** power
    truth /= truth.sum(axis=1, keepdims=True)
    labels = (truth.cumsum(axis=1) > gen.random((count, 1))).argmax(axis=1)
    return probs, labels


def made(count: int, seed: int, **given: float) -> Calibration:
    return Calibration(*rows(count, seed, **given))  # type: ignore[arg-type]


@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.95])
def test_lac_is_the_quantile_written_out(coverage: float) -> None:
    calibration, (probs, _) = made(137, 1, power=0.5), rows(500, 2)
    scores = np.sort(1.0 - calibration.probs[np.arange(137), calibration.labels].astype(float))
    largest = scores[math.ceil(138 * coverage) - 1]
    expected = 1.0 - probs.astype(float) <= largest + 1e-12
    found = conformal.sets(calibration, probs, coverage)
    assert np.array_equal(found, expected)
    assert 0 < found.sum() < found.size
    # double precision in, as predictions are, and the same sets out
    assert np.array_equal(conformal.sets(calibration, probs.astype(float) + 1e-10, coverage), expected)


@pytest.mark.parametrize("method", conformal.METHODS)
def test_sets_cover_as_often_as_asked_whatever_the_probabilities(method: str) -> None:
    """300 times 100 calibration rows and 40 others, from an overconfident model: within 5 standard errors."""
    trials = 300 if method == "lac" else 60
    found = []
    for trial in range(trials):
        probs, labels = rows(140, 100 + trial, power=0.4)
        made_of = Calibration(probs[:100], labels[:100])
        sets = conformal.sets(made_of, probs[100:], 0.8, method)
        found.append(conformal.observed(sets, labels[100:])["coverage"])
    error = np.std(found, ddof=1) / math.sqrt(trials)
    assert error < 0.012
    assert np.mean(found) > 0.8 - 5 * error
    if method == "lac":  # scores are continuous, so no more than 1 / (n + 1) above
        assert np.mean(found) < 0.8 + 1 / 101 + 5 * error


def test_threshold_is_the_fixed_sequence_written_out() -> None:
    calibration = made(400, 5, power=1.5)
    top = calibration.probs.max(axis=1).astype(float)
    wrong = calibration.probs.argmax(axis=1) != calibration.labels
    grid = np.linspace(0.99, 0.25, 51)
    p = [binom.cdf((wrong & (top >= t)).sum(), (top >= t).sum(), 0.15) for t in grid]
    safe = []
    for start in (0, 17, 34):
        at = start
        while at < len(grid) and p[at] <= 0.2 / 3:
            safe.append(grid[at])
            at += 1
    assert conformal.threshold(calibration, 0.15, 0.8) == pytest.approx(min(safe))
    assert 0.3 < min(safe) < 0.95


def test_thresholds_rarely_break_their_promise() -> None:
    """Of 200 thresholds for at most 15% errors, at 80% confidence, no more than a fifth may allow more."""
    probs, labels = rows(200_000, 7, power=1.5)
    top, wrong = probs.max(axis=1), probs.argmax(axis=1) != labels
    broken = given = 0
    for trial in range(200):
        try:
            least = conformal.threshold(made(250, 1000 + trial, power=1.5), 0.15, 0.8)
        except KilobayesError:
            continue
        given += 1
        broken += bool(wrong[top >= least].mean() > 0.15)
    assert given > 100  # and it is not kept by refusing
    assert broken <= 0.2 * 200 + 5 * math.sqrt(0.2 * 0.8 * 200)
    assert broken < 60


def test_refuses_where_no_threshold_is_safe() -> None:
    with pytest.raises(KilobayesError, match=r"no threshold .* calibration rows are at .*--held-out"):
        conformal.threshold(made(40, 3), 0.01)
    certain = Calibration(np.tile(np.float32([0.995, 0.005]), (67, 1)), np.zeros(67, dtype=int))
    # 67 rows without an error: 0.95 ** 67 is below a third of 1 - 0.9
    assert conformal.threshold(certain, 0.05) == pytest.approx(0.5)
    few = Calibration(certain.probs[:66], certain.labels[:66])
    with pytest.raises(KilobayesError, match="67 without an error"):
        conformal.threshold(few, 0.05)


def test_what_was_observed() -> None:
    found = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 1]], dtype=bool)
    out = conformal.observed(found, np.array([0, 2, 1, 1]))
    assert out == {"coverage": 0.5, "set_size": 1.25, "empty_sets": 0.25, "single_sets": 0.25}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"coverage": 1.0}, "between 0 and 1"),
        ({"coverage": float("nan")}, "between 0 and 1"),
        ({"method": "lack"}, "did you mean lac"),
        ({"coverage": 0.99}, "at least 101 calibration rows"),
    ],
)
def test_refuses(change: dict[str, object], match: str) -> None:
    with pytest.raises(KilobayesError, match=match):
        conformal.sets(made(60, 1), rows(5, 2)[0], **change)  # type: ignore[arg-type]


def test_two_classes_know_lac_alone() -> None:
    calibration, (probs, _) = made(60, 1, classes=2), rows(5, 2, classes=2)
    assert conformal.sets(calibration, probs).shape == (5, 2)
    with pytest.raises(KilobayesError, match="made by lac"):
        conformal.sets(calibration, probs, method="aps")


@pytest.mark.parametrize(
    ("probs", "labels"),
    [(np.ones((2, 2)), [0, 1]), (np.full((2, 2), 0.5), [0, 2]), (np.full((2, 2), 0.5), [0])],
)
def test_refuses_what_is_no_calibration(probs: np.ndarray, labels: list[int]) -> None:
    with pytest.raises(ValueError, match="probabilities"):
        Calibration(probs.astype(np.float32), np.array(labels))


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for ask in (
        lambda: conformal.sets(made(60, 1), rows(5, 2)[0]),
        lambda: conformal.threshold(made(60, 1), 0.5),
    ):
        with pytest.raises(KilobayesError, match=r"pip install .kilobayes\[conformal\]") as caught:
            ask()
        assert caught.value.exit_code == 3
