"""Figures of language models against plain sums, and what may be compared between two runs."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from kilobayes.errors import KilobayesError
from kilobayes.metrics.evaluation import Evaluation
from kilobayes.metrics.intervals import paired_difference as paired_rows
from kilobayes.metrics.language import TokenScores, comparable, paired_difference, reliability, summarise
from kilobayes.metrics.texts import TextEvaluation, to_json


def scored(shift: float = 0.0, documents: int = 12, seed: int = 0) -> TokenScores:
    """Documents of 3 to 9 tokens; ``shift`` nats are added to every loss."""
    gen = np.random.default_rng(seed)
    counts = gen.integers(3, 10, size=documents)
    n = int(counts.sum())
    return TokenScores(
        nll=gen.exponential(size=n) + shift,
        confidence=gen.uniform(0.05, 1.0, size=n),
        right=gen.uniform(size=n) < 0.5,
        entropy=gen.uniform(size=n),
        information=gen.uniform(size=n) / 10,
        document=np.repeat(np.arange(documents), counts),
        bytes=4 * counts,
    )


def test_a_difference_of_all_tokens_is_certain_though_documents_are_not() -> None:
    worse, better = scored(0.25), scored(0.0)
    found = paired_difference("nll", worse, better)
    assert (found.value, found.low, found.high) == pytest.approx((-0.25, -0.25, -0.25))
    # a quarter of a nat a token is log2(e) / 4 bits of 4 bytes
    in_bits = paired_difference("bits_per_byte", worse, better)
    assert (in_bits.low, in_bits.high) == pytest.approx((-0.0625 / math.log(2), -0.0625 / math.log(2)))
    alone = summarise(worse)["nll"]
    assert alone.high - alone.low > 0.1


def test_one_token_a_document_is_a_row() -> None:
    # then pairing by documents is pairing by rows, whose code is another
    gen = np.random.default_rng(3)
    labels, probs = gen.integers(0, 2, size=40), [gen.uniform(0.1, 0.9, size=40) for _ in range(2)]
    rows = [
        Evaluation(str(i), ["a", "b"], labels, np.stack([1 - p, p], 1), np.zeros(40), [""] * 40)
        for i, p in enumerate(probs)
    ]
    tokens = [
        TokenScores(
            nll=-np.log(one.probs[np.arange(40), labels]),
            confidence=one.probs.max(axis=1),
            right=one.probs.argmax(axis=1) == labels,
            entropy=np.zeros(40),
            information=np.zeros(40),
            document=np.arange(40),
            bytes=np.ones(40, dtype=int),
        )
        for one in rows
    ]
    for metric in ("nll", "ece", "accuracy"):
        ours, theirs = paired_difference(metric, *tokens), paired_rows(metric, *rows)
        assert ours.value == pytest.approx(theirs.value)
        # other draws of the same rows
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.06)


def test_what_may_be_compared() -> None:
    one = scored()
    assert "perplexity" in comparable(one, scored(1.0))
    split = dataclasses.replace(
        one,
        **{
            name: np.append(getattr(one, name), getattr(one, name)[-1])
            for name in ("nll", "confidence", "right", "entropy", "information", "document")
        },
    )
    assert comparable(one, split) == ("bits_per_byte",)
    assert comparable(one, scored(seed=1)) == ()
    with pytest.raises(KilobayesError, match="nll of the two cannot be compared"):
        paired_difference("nll", one, split)


def test_reliability_is_that_of_tokens_and_averages_to_the_calibration_error() -> None:
    scores = scored(documents=30)
    table, intervals = reliability(scores, bins=5)
    inside = (scores.confidence > 0.4) & (scores.confidence <= 0.6)
    assert table.count[2] == inside.sum()
    assert table.accuracy[2] == pytest.approx(scores.right[inside].mean())
    assert table.confidence[2] == pytest.approx(scores.confidence[inside].mean())
    assert intervals[2].low < table.accuracy[2] < intervals[2].high
    gap = np.abs(table.accuracy - table.confidence)[table.count > 0]
    expected = (gap * table.count[table.count > 0]).sum() / table.count.sum()
    assert summarise(scores, bins=5)["ece"].value == pytest.approx(expected)


def test_the_file_has_counts_definitions_and_differences() -> None:
    arms = [TextEvaluation("a", scored(0.5), scored(seed=2)), TextEvaluation("b", scored(), scored(seed=2))]
    found = to_json(arms, [summarise(a.scores, a.ood) for a in arms], {"title": "t"})
    first, second = found["runs"]
    assert first["tokens"] == len(arms[0].scores.nll)
    assert first["ood_documents"] == 12
    assert "less_first" not in first
    assert second["less_first"]["nll"]["value"] == pytest.approx(-0.5)
    assert set(found["definitions"]) == {k.removeprefix("ood_") for k in first["metrics"]} - {
        "auroc",
        "auroc_mi",
    } | {"ood_auroc", "ood_auroc_mi"}
