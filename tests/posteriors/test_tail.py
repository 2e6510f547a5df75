from __future__ import annotations

import itertools

import pytest

from kilobayes.optim import linear
from kilobayes.posteriors import SWA, tail
from kilobayes.types import Progress


def at(step: int, steps: int, per_epoch: int = 10) -> Progress:
    return Progress(step, steps, per_epoch, 100)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 40, 101, 1000])
@pytest.mark.parametrize("start", [0.0, 0.5, 0.73, 0.99])
@pytest.mark.parametrize("snapshots", [1, 2, 5, 20])
def test_as_many_as_asked_evenly_and_the_last_step(steps: int, start: float, snapshots: int) -> None:
    due = [s for s in range(1, steps + 1) if tail.due(at(s, steps), start, snapshots, False)]
    length = steps - tail.first(steps, start)
    assert len(due) == min(snapshots, length) >= 1
    assert due[-1] == steps
    assert min(due) > min(round(start * steps), steps - 1)
    gaps = {b - a for a, b in itertools.pairwise(due)}
    assert max(gaps, default=0) - min(gaps, default=0) <= 1


def test_by_epoch() -> None:
    due = [s for s in range(1, 48) if tail.due(at(s, 47), 0.4, 3, True)]
    assert due == [20, 30, 40, 47]  # the last epoch is shorter; snapshots is not asked


def own(step: int) -> float:
    return linear((step - 0.5) / 100, 0.06)


def test_constant_rate() -> None:
    rates = {s: tail.rate(at(s, 100), own, 0.6, 0.3, 0.0) for s in (1, 3, 59, 60, 61, 100)}
    assert rates == {1: own(1), 3: own(3), 59: own(59), 60: own(60), 61: 0.3, 100: 0.3}


def test_annealed_rate_is_linear_from_where_it_stood() -> None:
    rates = [tail.rate(at(s, 100), own, 0.6, 0.3, 0.2) for s in range(1, 101)]
    assert rates[:60] == [own(s) for s in range(1, 61)]
    for share in (1, 7, 13, 20):
        expected = own(60) + share / 20 * (0.3 - own(60))
        assert rates[59 + share] == pytest.approx(expected, rel=1e-12)
    assert rates[79:] == [0.3] * 21


def test_anneal_up_to_the_end_and_from_the_first_step() -> None:
    assert tail.rate(at(100, 100), own, 0.9, 0.5, 0.1) == pytest.approx(0.5)
    assert tail.rate(at(1, 100), own, 0.0, 0.5, 0.0) == 0.5
    assert tail.rate(at(1, 100), own, 0.0, 0.5, 0.5) == pytest.approx(own(1) + 1 / 50 * (0.5 - own(1)))


def test_a_fraction_that_floating_point_rounds_is_taken() -> None:
    SWA(start=0.9, anneal=0.1)
    SWA(start=0.7, anneal=0.3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"start": -0.1},
        {"start": 1.0},
        {"start": float("nan")},
        {"snapshots": 0},
        {"rate_held": 0.0},
        {"rate_held": float("nan")},
        {"anneal": 0.6},
        {"anneal": -0.1},
    ],
)
def test_settings_outside_their_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SWA(**wrong)  # type: ignore[arg-type]
