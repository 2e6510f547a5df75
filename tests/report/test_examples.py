"""Which rows the page shows."""

from __future__ import annotations

import numpy as np

from kilobayes.metrics.evaluation import Evaluation
from kilobayes.report.examples import LONGEST, choose


def test_examples_are_the_rows_the_rules_say() -> None:
    probs = np.array([[0.9, 0.1, 0.0], [0.5, 0.45, 0.05], [0.1, 0.8, 0.1], [0.7, 0.1, 0.2]])
    outside = np.array([[0.4, 0.3, 0.3], [0.98, 0.01, 0.01]])
    arm = Evaluation(
        "a", ["x", "y", "z"], np.array([0, 0, 2, 1]), probs, np.zeros(4), ["r0", "r1", "t" * 400, "r3"],
        ood_probs=outside, ood_texts=["o0", "o1"],
    )  # fmt: skip
    groups = {group.title: group.examples for group in choose(arm, count=2)}
    rows = {title: [example.row for example in examples] for title, examples in groups.items()}
    assert rows == {
        "Surest and right": [0, 1],
        "Surest and wrong": [2, 3],
        "Most torn": [1, 3],
        "Out of distribution, and it shows": [0, 1],
        "Out of distribution, unnoticed": [1, 0],
    }
    wrong = groups["Surest and wrong"][0]
    assert wrong.guesses == [("y", 0.8), ("x", 0.1)]
    assert wrong.truth == "z"
    assert wrong.text == "t" * LONGEST + "…"
    assert groups["Out of distribution, unnoticed"][0].truth is None


def test_groups_without_rows_are_left_out() -> None:
    arm = Evaluation("a", ["x", "y"], np.zeros(3, int), np.tile([0.9, 0.1], (3, 1)), np.zeros(3), list("abc"))
    assert [group.title for group in choose(arm)] == ["Surest and right", "Most torn"]
