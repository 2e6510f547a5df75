"""Summaries of a sequence on numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from kilobayes.lm.generated import Generated


def test_summaries_of_a_sequence() -> None:
    one = Generated([5, 6], [math.log(0.5), math.log(0.125)], [1.0, 2.0], [0.25, 0.5], [[], []], "stop")
    assert one.log_prob == pytest.approx(math.log(1 / 16))
    assert one.perplexity == pytest.approx(4.0)
    assert (one.mean_entropy, one.mean_information) == (1.5, 0.375)
    assert math.isnan(Generated().perplexity)
    assert math.isnan(Generated().mean_entropy)
    assert math.isnan(Generated().mean_information)
