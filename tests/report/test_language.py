"""The report of language models: what it says, shades and escapes."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from kilobayes.errors import KilobayesError
from kilobayes.metrics.intervals import Interval
from kilobayes.metrics.language import summarise
from kilobayes.metrics.texts import Excerpt, TextEvaluation
from kilobayes.report.language import build_page

from ..metrics.test_language import scored

HOSTILE = "<script>alert(1)</script>{{ 7 * 7 }}"


def excerpt(outside: bool = False) -> Excerpt:
    nll = np.array([np.nan, 1.0, 2.0, 3.0])
    entropy, information = np.array([np.nan, 0.5, 2.0, 1.0]), np.array([np.nan, 0.0, 0.1, 0.05])
    return Excerpt(outside, ["<s>", " once", HOSTILE, " upon"], nll, entropy, information)


def arms() -> list[TextEvaluation]:
    spec = {"posterior": "Point()", "seed": "0"}
    cost = {"stored_bytes": 4100.0, "seconds": 42.0}
    ood = scored(1.0, seed=5)
    return [
        TextEvaluation("a", scored(0.25), ood, [excerpt(), excerpt(True)], cost, spec),
        TextEvaluation("b", scored(), ood, [excerpt()], cost, spec),
    ]


def page(evaluations: list[TextEvaluation]) -> str:
    return build_page(evaluations, [summarise(a.scores, a.ood) for a in evaluations], {"title": "stories"})


@pytest.fixture(scope="module")
def text() -> str:
    return page(arms())


def test_it_says_who_leads_by_documents(text: str) -> None:
    assert "Of 2 arms, b has the lowest NLL" in text
    assert "b is 0.250 nats per token (95% interval 0.250 to 0.250) below the runner-up, a" in text
    assert "The documents support the lead." in text
    assert "12 test documents of" in text
    assert "−0.250" in text  # in the table of differences
    assert "4.1 kB" in text


def test_tokens_are_shaded_by_entropy_and_underlined_by_disagreement(text: str) -> None:
    shades = re.findall(r'style="--u:(\d+)%;--m:([\d.]+)"', text)
    assert shades[:3] == [("25", "0.00"), ("100", "1.00"), ("50", "0.50")]  # of 2 nats, and of 0.1
    assert len(shades) == 9
    assert text.count('<span class="read">&lt;s&gt;</span>') == 3
    assert "probability 0.37, entropy 0.50" in text


def test_texts_are_escaped_and_nothing_is_fetched(text: str) -> None:
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;{{ 7 * 7 }}" in text
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in re.findall(r'href="(#[^"]+)"', text)} <= set(ids)


def test_one_run_without_more_has_no_differences_texts_or_shift() -> None:
    alone = page([TextEvaluation("a", scored())])
    assert 'id="paired"' not in alone
    assert 'id="texts"' not in alone
    assert "Entropy under shift" not in alone
    assert "Loss of documents." in alone
    assert "a has an NLL of" in alone


def test_runs_of_other_tokens_are_ranked_by_bytes() -> None:
    first, second = arms()
    s = second.scores
    doubled = dataclasses.replace(
        s, **{
            name: np.repeat(getattr(s, name), 2)
            for name in ("nll", "confidence", "right", "entropy", "information", "document")
        },
    )  # fmt: skip
    found = page([first, dataclasses.replace(second, scores=doubled)])
    assert "has the lowest loss per byte" in found
    assert "a is " in found
    assert " bits per byte (95% interval" in found


def test_arms_and_summaries_must_pair_up() -> None:
    with pytest.raises(KilobayesError, match="one summary for each"):
        build_page(arms(), [{"nll": Interval(1, 1, 1)}], {})
