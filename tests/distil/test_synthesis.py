"""Inputs are proposed, sifted and counted: every number against a count by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from kilobayes.distil.duplicates import Duplicates, duplicates, similarity
from kilobayes.distil.generators import Given, Perturbation, Retrieval, by_words
from kilobayes.distil.rows import Row, half, normal, of_documents, of_examples, to_examples
from kilobayes.distil.synthesis import Synthesis, synthesise
from kilobayes.errors import KilobayesError
from kilobayes.tasks.data import Examples
from kilobayes.tasks.text import Documents

COLOURS = ("red", "blue", "green")


def short(rows: Sequence[Row]) -> np.ndarray:
    return np.array([len(row[0]) < 4 for row in rows])


class Listed:
    """A generator whose proposals are given, unusable ones too."""

    def __init__(self, *proposals: str | None) -> None:
        self.proposals = [None if p is None else (p,) for p in proposals]

    def propose(self, first: int, count: int) -> list[Row | None]:
        return list(self.proposals[first : first + count])


PROPOSALS = ("a", "a", None, "long one", "Seed!", "b", "another", None, "c", "d", "e")


@pytest.mark.parametrize("at_once", [1, 3, 64])
def test_every_proposal_is_counted_once_and_none_after_the_last(at_once: int) -> None:
    found = synthesise(Listed(*PROPOSALS), [("seed",)], n=3, max_tries=20, accept=short, at_once=at_once)
    assert found == Synthesis([("a",), ("b",), ("c",)], tries=9, malformed=2, repeated=2, rejected=2)
    assert found.acceptance == pytest.approx(3 / 5)


def test_it_goes_on_where_it_stopped() -> None:
    kept: list[Synthesis] = []
    whole = synthesise(Listed(*PROPOSALS), [], n=4, max_tries=20, accept=short, at_once=2, keep=kept.append)
    assert len(kept) == 5
    for begin in kept:
        assert (
            synthesise(Listed(*PROPOSALS), [], n=4, max_tries=20, accept=short, at_once=2, begin=begin)
            == whole
        )


@pytest.mark.parametrize(
    ("max_tries", "why"), [(8, "8 proposals .no more are allowed"), (99, "11 .*has no more")]
)
def test_too_few_is_an_error_that_says_what_to_do(max_tries: int, why: str) -> None:
    with pytest.raises(KilobayesError, match=why) as caught:
        synthesise(Listed(*PROPOSALS), [("seed",)], n=7, max_tries=max_tries, accept=short)
    assert "--max-tries" in caught.value.remedy
    assert "2 rejected" in caught.value.found


def test_nothing_refused_still_ends() -> None:
    with pytest.raises(KilobayesError, match="only 0 of 5"):
        synthesise(Listed(*"abcdefgh"), [], n=5, max_tries=6, accept=lambda rows: np.zeros(len(rows), bool))
    with pytest.raises(KilobayesError, match="cannot give"):
        synthesise(Listed(*"abcdefgh"), [], n=5, max_tries=4)


def test_filtering_raises_the_share_that_is_of_the_task() -> None:
    """Texts of the task name a colour. The filter sees that with an error of one in ten."""
    draw = np.random.default_rng(0)
    words = [f"w{i}" for i in range(30)]

    def text() -> Row:
        chosen = [words[i] for i in draw.integers(0, 30, 5)]
        return (" ".join([*chosen, COLOURS[draw.integers(3)]] if draw.random() < 0.3 else chosen),)

    pool = [text() for _ in range(2000)]
    inside = {row: any(c in row[0] for c in COLOURS) for row in pool}
    wrong = {row: draw.random() < 0.1 for row in pool}

    def accept(rows: Sequence[Row]) -> np.ndarray:
        return np.array([inside[row] != wrong[row] for row in rows])

    def share(found: Synthesis) -> float:
        return sum(inside[row] for row in found.rows) / len(found.rows)

    raw = synthesise(Given(pool), [], n=400, max_tries=2000)
    filtered = synthesise(Given(pool), [], n=400, max_tries=2000, accept=accept)
    assert share(raw) == pytest.approx(0.3, abs=0.06)
    # Bayes: 0.3 * 0.9 / (0.3 * 0.9 + 0.7 * 0.1)
    assert share(filtered) == pytest.approx(0.794, abs=0.06)


def test_duplicates_are_counted_exactly() -> None:
    known = [("The cat sat on the mat.",), ("Dogs bark at night, always.",)]
    rows = [
        ("the CAT sat on the mat",),  # exact, but for case and points
        ("the cat sat on the mats",),  # near
        ("the mat sat on the cat",),  # the same words in another order
        ("something else",),
    ]
    assert duplicates(rows, known) == Duplicates(rows=4, known=2, exact=1, near=1)
    assert duplicates(rows, []) == Duplicates(4, 0, 0, 0)
    assert duplicates(rows, known, threshold=1.0).near == 0


def test_similarity_is_the_jaccard_index_of_runs_of_characters() -> None:
    draw = np.random.default_rng(3)
    texts = ["".join("abc "[i] for i in draw.integers(0, 4, draw.integers(0, 12))) for _ in range(300)]
    texts = [" ".join(t.split()) for t in texts]

    def runs(text: str) -> set[str]:
        framed = f"##{text}##"
        return {framed[i : i + 5] for i in range(len(framed) - 4)} or {framed}

    found = similarity(texts[:270], texts[270:])
    for i in (0, 100, 256, 269):
        for j, other in enumerate(texts[270:]):
            a, b = runs(texts[i]), runs(other)
            if min(len(texts[i]), len(other)):  # the frame alone has no run
                assert found[i, j] == pytest.approx(len(a & b) / len(a | b), abs=1e-6)


def test_retrieval_takes_each_seeds_nearest_in_turn() -> None:
    pool = [("w x",), ("red cat",), ("blue dog",), ("red cat sat",), ("blue dog ran off",)]
    found = Retrieval([("red cat",), ("blue dog",)], pool, by_words).propose(0, 10)
    assert found[:2] == [("red cat",), ("blue dog",)]
    assert set(found[2:4]) == {("red cat sat",), ("blue dog ran off",)}
    assert found[4] == ("w x",)


def test_perturbations_are_a_beginning_and_an_end_with_words_left_out() -> None:
    seeds, pool = [("a b c d",)], [("p q r s",), ("t u v",)]
    found = Perturbation(seeds, pool, drop=0.0).propose(0, 200)
    starts = [row[0].split() for row in (*seeds, *pool)]
    for row in found:
        assert row is None or any(
            row[0].split() == s[:i] + e[j:]
            for s in starts
            for e in starts[1:]
            for i in range(5)
            for j in range(5)
        )
    assert sum(row is not None and row[0].split()[0] in "abcd" for row in found) > 60
    assert Perturbation(seeds, pool).propose(7, 3) == Perturbation(seeds, pool).propose(0, 10)[7:]
    lengths = [len(row[0].split()) for row in Perturbation(seeds, pool, drop=0.9).propose(0, 200) if row]
    assert np.mean(lengths) < 2


def test_pairs_stay_pairs() -> None:
    seeds = [("a b", "c d")]
    rows = Perturbation(seeds, [("e f", "g h")], drop=0.0).propose(0, 50)
    first, second = {"a", "b", "e", "f"}, {"c", "d", "g", "h"}
    for row in rows:
        assert row is None or (set(row[0].split()) <= first and set(row[1].split()) <= second)
    examples = Examples(["x", "y"], ["1", "2"], [0, 1], ["n", "p"])
    assert to_examples(of_examples(examples), ["n", "p"], [0, 1]) == examples


def test_halves_are_apart_and_do_not_depend_on_spelling() -> None:
    rows = [(f"text number {i}",) for i in range(1000)]
    assert 440 < sum(half(row) for row in rows) < 560
    assert all(half(row) == half((row[0].upper() + "!",)) for row in rows[:50])
    assert normal(("A, b!", "C")) == "a b | c"


def test_what_a_language_model_is_given() -> None:
    assert of_documents(Documents("text", ["one two\n three four", "  "]), 3) == [("one two three",)]
    assert of_documents(Documents("pairs", [("ask", "answer")]), 1) == [("ask",)]
    with pytest.raises(KilobayesError, match="conversations"):
        of_documents(Documents("chat", [[]]), 3)
