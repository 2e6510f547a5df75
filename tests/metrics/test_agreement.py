"""Clusters of answers on cases worked out by hand."""

from __future__ import annotations

import itertools
import math

import pytest

from kilobayes.metrics.agreement import agreement, token_f1, words


def test_words_are_what_is_said() -> None:
    assert words("The  Eiffel-Tower, in “Paris”!") == ["eiffel", "tower", "in", "paris"]
    assert words("It's 1,234.5 at 10:30, not -7.") == ["it's", "1234.5", "at", "10:30", "not", "-7"]
    assert words("It’s") == words("it's")
    assert words("The") == ["the"]  # an article alone is an answer
    assert words(" ?! ") == ["?!"]
    assert words("") == [""]


def test_overlap_is_the_harmonic_mean_of_precision_and_recall() -> None:
    assert token_f1(["a", "b", "c", "d"], ["a", "b", "e"]) == pytest.approx(
        2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3)
    )
    assert token_f1(["x", "x", "y"], ["x", "z"]) == pytest.approx(2 * 1 / 5)  # a repeat counts once
    assert token_f1(["p", "q"], ["q", "p"]) == 1.0


def test_entropy_is_over_clusters() -> None:
    found = agreement(["Paris.", "the paris", "London", "PARIS", "Rome!"])
    assert found.clusters == [0, 0, 1, 0, 2]
    assert found.entropy == pytest.approx(-(0.6 * math.log(0.6) + 2 * 0.2 * math.log(0.2)))
    assert (found.share, found.best) == (0.6, 0)
    assert agreement(["one", "two", "three"]).entropy == pytest.approx(math.log(3))
    same = agreement(["yes", "Yes", "yes."])
    assert (same.entropy, same.share, same.clusters) == (0.0, 1.0, [0, 0, 0])
    assert agreement(["alone"]).entropy == 0.0


def test_texts_that_overlap_agree_unless_a_number_or_negation_differs() -> None:
    said = "he sold nine red apples and three green pears at market"
    assert agreement([said, said.replace("red", "small")]).clusters == [0, 0]
    assert agreement([said, said.replace("red", "small")], overlap=None).clusters == [0, 1]
    assert agreement([said, f"{said} today"], overlap=0.99).clusters == [0, 1]
    assert agreement([f"{said} for 12 euros", f"{said} for 13 euros"]).clusters == [0, 1]
    for denied in ("he never sold", "he didn't sold", "he has not sold"):
        assert agreement([said, said.replace("he sold", denied)], overlap=0.5).clusters == [0, 1]
    assert agreement([f"no {said}", f"not {said}"], overlap=0.5).clusters == [0, 0]


def test_clusters_do_not_depend_on_the_order() -> None:
    chain = ["a1 b c d e f g h", "x", "b c d e f g h i", "c d e f g h i j", "q"]
    chain[0] = "b c d e f g h k"  # 0-2 and 2-3 overlap by 7/8, 0-3 by 6/8: one cluster through the second
    for order in itertools.permutations(range(5)):
        found = agreement([chain[i] for i in order], overlap=0.8).clusters
        cluster = dict(zip(order, found, strict=True))
        assert cluster[0] == cluster[2] == cluster[3]
        assert len(set(found)) == 3


def test_the_best_is_most_like_the_others_of_the_largest_cluster() -> None:
    chain = ["b c d e f g h k", "b c d e f g h i", "c d e f g h i j", "other", "other"]
    found = agreement(chain)
    assert found.clusters == [0, 0, 0, 1, 1]
    assert found.best == 1
    assert agreement(["left", "right", "right", "left"]).best == 0  # equally large: the first


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(ValueError, match="no texts"):
        agreement([])
    with pytest.raises(ValueError, match=r"found 1\.5"):
        agreement(["a"], overlap=1.5)
