"""The classifier with a decoder that answers: questions with options, and labels that are words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.model_selection import KFold, cross_val_score

import kilobayes as kb
from kilobayes.cli import run as command
from kilobayes.errors import KilobayesError

from . import small_choice


def make(**settings: Any) -> kb.Classifier:
    given: dict[str, Any] = {
        "task": "choice", "adapter": "LoRA(r=4)", "posterior": "Temperature(SWAG(rank=2))", "epochs": 5,
        "lr": 0.02, "batch_size": 8, "samples": 3, "max_length": 40, "target_modules": "all-linear",
    }  # fmt: skip
    return kb.Classifier(small_choice.base(), **given | settings)


def questions(count: int, seed: int) -> tuple[list[dict[str, Any]], np.ndarray]:
    rows = small_choice.questions(count, seed)
    return [{k: row[k] for k in ("question", "choices")} for row in rows], np.array(
        [r["answer"] for r in rows]
    )


ROWS, RIGHT = questions(120, 1)
NEW, TRUE = questions(40, 2)


@pytest.fixture(scope="module")
def fitted() -> kb.Classifier:
    return make().fit(ROWS, RIGHT)


def test_it_learns_the_places_of_options(fitted: kb.Classifier) -> None:
    assert fitted.classes_.tolist() == [0, 1, 2, 3]
    assert fitted.score(NEW, TRUE) > 0.6  # a third by chance, of two to four options
    probs = fitted.predict_proba(NEW)
    for row, own in zip(NEW, probs, strict=True):
        assert own[len(row["choices"]) :].tolist() == [0.0] * (4 - len(row["choices"]))
    assert np.allclose(probs.sum(axis=1), 1)
    assert fitted.predict_sets(NEW, 0.8).any(axis=1).mean() > 0.5


def test_letters_and_numbers_from_one_give_the_same(fitted: kb.Classifier) -> None:
    quick = make(epochs=1, posterior="Point()")
    zero = clone(quick).fit(ROWS, RIGHT)
    letters = clone(quick).fit(ROWS, np.array([*"ABCD"])[RIGHT])
    one = clone(quick).fit(pd.DataFrame(ROWS), RIGHT + 1)
    assert letters.classes_.tolist() == [*"ABCD"]
    assert one.classes_.tolist() == [1, 2, 3, 4]
    assert np.array_equal(letters.predict_proba(NEW), zero.predict_proba(NEW))
    assert np.array_equal(one.predict(NEW), zero.predict(NEW) + 1)
    with pytest.raises(KilobayesError, match="named by letter or by number"):
        clone(quick).fit(ROWS, [row["choices"][i] for row, i in zip(ROWS, RIGHT, strict=True)])


def test_a_saved_one_is_a_run(
    fitted: kb.Classifier, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fitted.save(tmp_path / "run")
    again = kb.load(tmp_path / "run")
    assert again.get_params()["task"] == "choice"
    assert again.classes_.tolist() == [0, 1, 2, 3]
    assert np.array_equal(again.predict_proba(NEW), fitted.predict_proba(NEW))
    lines = tmp_path / "test.jsonl"
    pd.DataFrame(NEW).assign(answer=TRUE).to_json(lines, orient="records", lines=True)
    assert command(["evaluate", str(tmp_path / "run"), "--data", str(lines), "--json"]) == 0
    assert f'"accuracy": {round(float(fitted.score(NEW, TRUE)), 6)}' in capsys.readouterr().out
    assert clone(again).fit(ROWS[:40], RIGHT[:40]).classes_.tolist() == [0, 1, 2, 3]


def test_labels_that_are_words() -> None:
    rows = small_choice.labelled(80, 3)
    texts, labels = [row["text"] for row in rows], np.array([bool(row["label"]) for row in rows])
    made = make(template="{text} ? Answer :", answers="no,yes").fit(texts, labels)
    assert made.classes_.tolist() == [False, True]
    assert made.fitted_.card.answers == ["no", "yes"]
    assert made.score(texts, labels) > 0.8
    assert np.array_equal(made.predict_proba(np.array(texts, dtype=object)), made.predict_proba(texts))


def test_scikit_learn_splits_rows_with_columns() -> None:
    quick = make(epochs=1, posterior="Point()")
    for rows in (pd.DataFrame(ROWS[:40]), ROWS[:40]):
        assert cross_val_score(quick, rows, RIGHT[:40], cv=KFold(2)).shape == (2,)
