"""Scores of edits against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from kilobayes.metrics.editing import (
    Answered,
    achieved,
    by_kind,
    fluency,
    mean,
    ngram_entropy,
    says,
    summarise,
    unchanged,
    untouched,
)


def answer(forced: list[int], tokens: list[int], text: str, kind: str = "") -> Answered:
    return Answered([5, 6, 7], forced, tokens, text, "Rome", kind)


@pytest.mark.parametrize(
    ("before", "after", "share"),
    [([1, 2, 3, 4], [1, 2, 9, 4], 0.75), ([1, 2], [1, 2, 3, 4], 0.5), ([], [], 1.0), ([1], [], 0.0)],
)
def test_unchanged_tokens(before: list[int], after: list[int], share: float) -> None:
    assert unchanged(before, after) == share
    assert unchanged(after, before) == share


def test_a_text_says_what_it_begins_with() -> None:
    assert says(" Rome, of course", "Rome")
    assert says("Romeo", " Rome ")
    assert not says("In Rome", "Rome")
    assert not says("Rom", "Rome")


def test_entropies_of_ngrams() -> None:
    words = ["a", "b", "a", "b", "a"]
    assert ngram_entropy(words, 2) == 1.0  # ab ba ab ba
    expected = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))  # aba bab aba
    assert ngram_entropy(words, 3) == pytest.approx(expected, abs=1e-12)
    assert ngram_entropy(["a"], 2) == 0.0
    assert ngram_entropy(["a"] * 9, 2) == 0.0
    eight = list("abcdefghi")
    assert ngram_entropy(eight, 2) == pytest.approx(3.0)


def test_fluency() -> None:
    assert fluency("a b a b a") == pytest.approx(50 * (2 / 3 * 1.0 + 4 / 3 * 0.9182958340544896))
    assert fluency("no, no, no") == pytest.approx(50 * (2 / 3 * 1.0 + 4 / 3 * 0.9182958340544896))
    assert fluency("") == 0.0
    distinct = " ".join(f"w{i}" for i in range(10))  # 9 pairs, 8 triples, all different
    assert fluency(distinct) == pytest.approx(50 * (2 / 3 * math.log2(9) + 4 / 3 * 3))


def test_means_are_over_kinds_first() -> None:
    assert by_kind([("a", 1.0), ("a", 0.0), ("a", 0.5), ("b", 1.0)]) == 0.75
    assert by_kind([("a", None), ("b", 1.0)]) == 1.0
    assert by_kind([]) is None
    assert mean([None, 1.0, 0.0]) == 0.5


def test_success_with_and_without_teacher_forcing() -> None:
    found = achieved("success", [answer([9, 6, 7], [9, 1], "Milan")])
    assert found == {"success_teacher": pytest.approx(2 / 3), "success_free": 0.0}
    assert achieved("generality", []) == {"generality_teacher": None, "generality_free": None}


def test_locality_and_what_was_kept() -> None:
    before = [answer([5, 6, 7], [5, 6, 7], "Rome"), answer([1, 6, 7], [1, 2, 3], "Milan")]
    after = [answer([5, 6, 8], [5, 6, 7], "Rome!"), answer([1, 6, 7], [4, 2, 9], "Paris")]
    found = untouched(before, after)
    assert found["locality_teacher"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["locality_free"] == pytest.approx((1 + 1 / 3) / 2)
    assert found["kept_teacher"] == 0.0  # of the first alone, which was right before
    assert found["kept_free"] == 1.0
    wrong = untouched(before[1:], after[1:])
    assert wrong["kept_teacher"] is None
    assert wrong["locality_teacher"] == 1.0  # wrong, but as wrong as before


def test_summaries_leave_out_what_is_not_scored() -> None:
    rows = [{"success_free": 1.0, "kept_free": None}, {"success_free": 0.0, "kept_free": 1.0}]
    found = summarise(rows)
    assert found["success_free"] == 0.5
    assert found["kept_free"] == 1.0
    assert found["portability_free"] is None
