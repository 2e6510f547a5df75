"""Formats, the table and the sentences, on numbers whose reading is plain."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from kilobayes.metrics.evaluation import Evaluation, Interval
from kilobayes.report.headline import findings, headline
from kilobayes.report.words import duration, number, percent, probability, size, table

NAN = math.nan


def arm(name: str, sure: float = 0.9, right: float = 0.8, rows: int = 100) -> Evaluation:
    """Every row says class 0 of 2 with probability ``sure``, and a share ``right`` of them is right."""
    labels = (np.arange(rows) >= right * rows).astype(int)
    probs = np.tile([sure, 1 - sure], (rows, 1))
    return Evaluation(
        name, ["yes", "no"], labels, probs, np.zeros(rows), [f"row {row}" for row in range(rows)]
    )


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(0.12345), "0.123"),
        (number(-0.5), "−0.500"),
        (number(NAN), "–"),
        (number(math.inf), "∞"),
        (number(-math.inf), "−∞"),
        (percent(0.8766), "87.7%"),
        (probability(1.0), "100.0%"),
        (probability(0.99999), ">99.9%"),
        (probability(0.00001), "<0.1%"),
        (probability(0.0), "0.0%"),
        (probability(0.5), "50.0%"),
        (size(812), "812 B"),
        (size(4100), "4.1 kB"),
        (size(999_900), "1 MB"),
        (size(7.1e8), "710 MB"),
        (size(2.5e13), "2.5e+04 GB"),
        (duration(3.21), "3.2 s"),
        (duration(41.7), "42 s"),
        (duration(59.7), "1 min 0 s"),
        (duration(200), "3 min 20 s"),
        (duration(4320), "1 h 12 min"),
        (duration(NAN), "–"),
        (size(NAN), "–"),
    ],
)
def test_formats(shown: str, expected: str) -> None:
    assert shown == expected


def test_table_marks_the_best_and_what_overlaps_it() -> None:
    arms = [arm("a"), arm("b"), arm("c")]
    nll = [Interval(0.4, 0.3, 0.5), Interval(0.45, 0.42, 0.6), Interval(0.7, 0.55, 0.8)]
    accuracy = [Interval(0.9, 0.8, 0.95), Interval(0.9, 0.85, 0.93), Interval(0.5, 0.4, 0.6)]
    columns = {
        column.key: cells
        for column, cells in table(arms, [{"nll": n, "accuracy": a} for n, a in zip(nll, accuracy)], bins=10)
    }
    assert set(columns) == {"nll", "accuracy"}
    assert [cell.mark for cell in columns["nll"]] == ["best", "overlaps", ""]
    assert [cell.mark for cell in columns["accuracy"]] == ["best", "best", ""]
    assert columns["nll"][0].value == "0.400"
    assert columns["nll"][0].interval == "0.300 – 0.500"
    # The scale of the column runs from 0.3 to 0.8.
    assert columns["nll"][1].span == pytest.approx((24.0, 30.0, 60.0))


def test_table_of_one_arm_has_no_winner_and_costs_have_no_interval() -> None:
    one = dataclasses.replace(arm("a"), cost={"stored_bytes": 4100.0})
    columns = {
        column.key: cells[0] for column, cells in table([one], [{"nll": Interval(NAN, NAN, NAN)}], bins=15)
    }
    assert set(columns) == {"stored_bytes"}
    assert (columns["stored_bytes"].value, columns["stored_bytes"].mark) == ("4.1 kB", "")
    assert columns["stored_bytes"].interval == ""
    assert columns["stored_bytes"].span is None


def test_second_table_holds_the_other_metrics_and_ranks_only_what_has_a_direction() -> None:
    summary = {"nll": Interval(1, 1, 1), "entropy": Interval(0.2, 0.1, 0.3), "aurc": Interval(0.1, 0.0, 0.2)}
    other = {"nll": Interval(1, 1, 1), "entropy": Interval(0.4, 0.3, 0.5), "aurc": Interval(0.3, 0.25, 0.4)}
    columns = {
        c.key: (c, cells) for c, cells in table([arm("a"), arm("b")], [summary, other], 15, main=False)
    }
    assert set(columns) == {"entropy", "aurc"}
    assert [cell.mark for cell in columns["entropy"][1]] == ["", ""]
    assert columns["entropy"][0].better == ""
    assert [cell.mark for cell in columns["aurc"][1]] == ["best", ""]


@pytest.mark.parametrize(
    ("others", "ending"),
    [
        ([Interval(0.7, 0.6, 0.8)], "; its interval is clear of the other."),
        ([Interval(0.7, 0.5, 0.8)], "; the two intervals overlap."),
        ([Interval(0.7, 0.6, 0.8)] * 2, "; its interval is clear of all others."),
        ([Interval(0.7, 0.4, 0.8)] * 2, "; all other intervals overlap it."),
        ([Interval(0.7, 0.4, 0.8), Interval(0.9, 0.8, 1.0)], "; the interval of b overlaps it."),
        (
            [Interval(0.7, 0.4, 0.8), Interval(0.8, 0.5, 1.0), Interval(2, 1, 3)],
            "; the intervals of b and “c, d” overlap it.",
        ),
        ([Interval(0.7, NAN, NAN)], "(95% interval 0.300 to 0.500)."),
    ],
)
def test_headline_says_who_leads_and_whether_intervals_overlap(others: list[Interval], ending: str) -> None:
    names = ["a", "b", "c, d", "e"][: len(others) + 1]
    found = headline(
        [arm(name) for name in names], [{"nll": nll} for nll in [Interval(0.4, 0.3, 0.5), *others]]
    )
    assert found.startswith(
        f"Of {len(names)} arms, a has the lowest NLL: 0.400 nats (95% interval 0.300 to 0.500)"
    )
    assert found.endswith(ending)


def test_headline_ignores_arms_without_a_finite_nll() -> None:
    arms, broken = [arm("a"), arm("b")], {"nll": Interval(math.inf, NAN, NAN)}
    assert "b has the lowest NLL: 0.400 nats." in headline(arms, [broken, {"nll": Interval(0.4, NAN, NAN)}])
    assert headline(arms, [broken, {}]) == "No arm has a finite NLL, so none is put first."


def test_headline_of_one_arm() -> None:
    found = headline([arm("a")], [{"nll": Interval(0.4, 0.3, 0.5)}])
    assert found == "a has an NLL of 0.400 nats (95% interval 0.300 to 0.500) on 100 test rows."


def test_runner_up_is_compared_on_the_same_rows() -> None:
    # Right in 80 of 100 rows: 80% is exactly calibrated, 99% pays ln(0.2 / 0.01) on each wrong row.
    good, bad = arm("good", sure=0.8), arm("bad", sure=0.99)
    summaries = [{"nll": Interval(1.0, NAN, NAN)}, {"nll": Interval(0.5, NAN, NAN)}]
    found = dict(findings([bad, good], summaries))["Row by row"]
    saved = 0.8 * math.log(0.8 / 0.99) + 0.2 * math.log(0.2 / 0.01)
    assert found.startswith(f"good is {saved:.3f} nats (95% interval ")
    assert "below the runner-up, bad" in found
    assert found.endswith("The rows support the lead.")
    close = dict(findings([good, arm("near", sure=0.81)], summaries[::-1]))["Row by row"]
    assert close.endswith("The rows do not settle which is better.")
    shorter = dict(findings([arm("short", rows=50), good], summaries))
    assert "Row by row" not in shorter


@pytest.mark.parametrize(
    ("sure", "words"),
    [
        (0.9, "90.0% sure on average and right on 80.0% of the rows: 10.0 points too sure on average."),
        (0.7, "70.0% sure on average and right on 80.0% of the rows: 10.0 points too unsure on average."),
        (0.82, "2.0 points too sure on average, which is within the interval of its accuracy."),
        (0.8, "about as sure as it is right, which is within the interval of its accuracy."),
    ],
)
def test_calibration_is_put_in_points(sure: float, words: str) -> None:
    summary = {"nll": Interval(0.5, 0.4, 0.6), "accuracy": Interval(0.8, 0.72, 0.88)}
    assert words in dict(findings([arm("a", sure)], [summary]))["Calibration"]


def test_accuracy_may_be_shared_and_shift_no_better_than_chance() -> None:
    arms = [arm("a"), arm("b"), arm("c")]
    low, high = Interval(0.7, 0.6, 0.8), Interval(0.9, 0.85, 0.95)
    found = dict(findings(arms, [{"accuracy": value} for value in (high, low, high)]))
    assert found["Accuracy"] == (
        "Shared highest: a and c with 90.0% (95% interval 85.0% to 95.0%). The other interval does not "
        "overlap it."
    )
    shift = Interval(0.55, 0.45, 0.65), Interval(0.52, 0.4, 0.6), Interval(0.3, 0.2, 0.4)
    found = dict(findings(arms, [{"ood_auroc": value} for value in shift]))
    assert found["Out of distribution"] == (
        "AUROC of entropy (chance is 0.5). Highest: a with 0.550 (95% interval 0.450 to 0.650). 1 of the 2 "
        "other intervals overlaps it. That is no better than chance."
    )
