"""A language model goes on with a list of seeds."""

from __future__ import annotations

import numpy as np
import pytest

from kilobayes.distil.generators import Continuation
from kilobayes.errors import KilobayesError
from kilobayes.language import LanguageModel
from kilobayes.lm.sampling import Sampling

from .. import small_lm


def test_a_list_of_seeds_is_continued() -> None:
    model = LanguageModel.load(small_lm.base())
    seeds = [("ba be",), ("da de",), ("fa fe",)]
    made = Continuation(model, seeds, "numbered", shots=2, sampling=Sampling(6, 1.0))
    prompt = made._prompt(np.random.default_rng([0, 4]))
    lines = prompt.split("\n")
    assert [line.split(". ")[0] for line in lines] == ["1", "2", "3."]
    assert {(line[3:],) for line in lines[:2]} < set(seeds)
    assert made.propose(4, 3) == made.propose(4, 3)
    assert made._row("", " ki ka") == ("ki ka",)
    assert made._row("", "  ") is None
    opening = Continuation(model, seeds, "opening", words=3, sampling=Sampling(6, 1.0))
    rows = [row for row in opening.propose(0, 12) if row]
    assert rows
    assert all(row[0].split()[0] in ("ba", "da", "fa") and len(row[0].split()) <= 3 for row in rows)
    pairs = Continuation(model, [("a", "b")], "plain", sampling=Sampling(6, 1.0))
    assert pairs._prompt(np.random.default_rng(0)) == "a ||| b\n"
    assert [pairs._row("", t) for t in (" x ||| y", "x", "x ||| ", "x|||y|||z")] == [
        ("x", "y"),
        None,
        None,
        None,
    ]
    with pytest.raises(KilobayesError, match="not one seed fits"):
        Continuation(model, [("ba " * 60,)], "plain").propose(0, 1)
