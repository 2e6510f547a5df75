"""Rows as scikit-learn hands them over: lists, arrays and frames, of texts or of columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kilobayes.errors import KilobayesError
from kilobayes.tasks.data import Examples, load_examples
from kilobayes.tasks.layouts import find_options
from kilobayes.tasks.prompt import Prompt
from kilobayes.tasks.questions import load_questions
from kilobayes.tasks.sources import read_source
from kilobayes.tasks.table import Table

RIGHT = "the right answer"  # a column that no data have


def texts(X: Any) -> list[Any]:
    """Strings, or pairs of them, from a list, an array of strings, or one or two columns."""
    if isinstance(X, Examples):
        return X.texts if X.pairs is None else list(zip(X.texts, X.pairs, strict=True))
    if hasattr(X, "to_numpy"):
        X = X.to_numpy()
    rows: Sequence[Any] = list(X)
    out: list[Any] = []
    for number, row in enumerate(rows, 1):
        if isinstance(row, np.ndarray | list | tuple):
            row = row[0] if len(row) == 1 else tuple(row)
        if not (
            isinstance(row, str)
            or (isinstance(row, tuple) and len(row) == 2 and all(isinstance(t, str) for t in row))
        ):
            raise KilobayesError(
                f"row {number} is no text or pair of texts", f"found {row!r:.60}", "give strings"
            )
        out.append(str(row) if isinstance(row, str) else row)
    if not out:
        raise KilobayesError("there are no texts")
    return out


def labelled(X: Any, labels: Sequence[int], names: Sequence[str]) -> Examples:
    """Texts with their labels."""
    return replace(load_examples(texts(X), need_labels=False), labels=list(labels), classes=list(names))


def columns(X: Any) -> dict[str, Any]:
    """Columns by name, of a frame, a dictionary of columns or a list of rows; or of texts.

    Raises:
        KilobayesError: no rows, or rows that are neither.
    """
    if isinstance(X, np.ndarray) and X.ndim == 1:
        X = list(X)
    named = isinstance(X, Mapping) or (hasattr(X, "columns") and hasattr(X, "to_numpy"))
    named = named or (isinstance(X, Sequence) and bool(X) and isinstance(X[0], Mapping))
    return dict(read_source(X if named else texts(X), None).columns)


def prompts(
    rows: dict[str, Any], y: np.ndarray, names: Sequence[str], template: str | None, answers: str | None
) -> tuple[Examples, np.ndarray | None]:
    """Rows as they are put to a language model, with their right answers.

    Args:
        rows: columns by name.
        y: labels ``(N,)``; of questions with options, a letter or a number of each row's option.
        names: what classes are called in text, sorted as their labels are.

    Returns:
        The rows, and what ``y`` calls each place of an option; None where labels are the classes.

    Raises:
        KilobayesError: as reading questions; options that are named by anything else.
    """
    own: dict[str, Any] = {"template": template, "answers": answers, "label_column": RIGHT}
    if find_options(Table("the data", rows)) is None:
        return load_questions(rows | {RIGHT: [str(label) for label in y]}, classes=names, **own), None
    found = load_questions(rows | {RIGHT: y.tolist()}, **own)
    labels = found.labels or []
    called = np.asarray(found.classes)
    if y.dtype.kind in "iu":
        called = np.arange(len(called)) + int(y[0]) - labels[0]
    if not np.array_equal(called[labels], y):
        raise KilobayesError(
            "right options are named by letter or by number",
            f"found {y[0]!r:.40} for {found.classes[labels[0]]}",
            "as in y = ['A', 'C', ...], or [0, 2, ...]",
        )
    return replace(found, classes=[str(name) for name in called]), called


def rows_of(X: Any, prompt: Prompt | None) -> Any:
    """What a run with this prompt reads: texts, or columns where a template names them."""
    if isinstance(X, Examples) and prompt is not None:
        return X
    return texts(X) if prompt is None else columns(X)
