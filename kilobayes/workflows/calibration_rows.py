"""The rows of a calibration, and what can be seen of them before anything is fitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from kilobayes.errors import KilobayesError
from kilobayes.tasks.data import Examples, available_splits
from kilobayes.workflows.data import TESTS, repeated

FEWEST, FEW = 10, 100  # rows to calibrate on: refused below, noted below
HELD = ("calibration", *TESTS[1:], "test", "train")


@dataclass(frozen=True)
class Sources:
    """Where the rows come from.

    Attributes:
        data: labelled rows to calibrate on, in any form that ``load_examples`` takes.
        split: their split; by default the first there is of validation and its other names, test, train.
        train, test: rows that it was trained on, and rows to evaluate on: data, or a split of ``data``.
        columns: names of the columns of text, pair and label, where they are not found.
        limit: at most so many rows of each.
    """

    data: Any
    split: str | None = None
    train: Any = None
    test: Any = None
    columns: dict[str, str | None] = field(default_factory=dict)
    limit: int | None = None


@dataclass(frozen=True)
class Rows:
    """What :class:`Sources` name, read."""

    calibration: Examples
    train: Examples | None
    test: Examples | None


def place(
    source: Any,
    sources: Sources,
    prefer: Sequence[str],
    splits: Callable[[Any], list[str]] = available_splits,
) -> tuple[Any, str | None]:
    """A source and its split: one of the data's own where its name is that, else the first preferred."""
    if isinstance(source, str) and source in splits(sources.data):
        return sources.data, source
    there = splits(source)
    return source, next((name for name in prefer if name in there), there[0] if there else None)


def read_rows(sources: Sources, read: Callable[[Any, str | None], Examples]) -> Rows:
    """All rows, by a function of a source and its split.

    Raises:
        KilobayesError: as ``read``; too few rows to calibrate on; single texts here, pairs there.
    """
    named = (sources.data, sources.split) if sources.split else place(sources.data, sources, HELD)
    held = read(*named)
    train = None if sources.train is None else read(*place(sources.train, sources, ("train",)))
    test = None if sources.test is None else read(*place(sources.test, sources, TESTS))
    if len(held) < FEWEST:
        raise KilobayesError(
            f"{len(held)} rows are too few to calibrate on", f"at least {FEWEST} are needed, better {FEW}"
        )
    if any(rows is not None and (rows.pairs is None) != (held.pairs is None) for rows in (train, test)):
        raise KilobayesError(
            "the rows are not all of one kind",
            "single texts in some, pairs in others",
            "name the columns with --text-column and --pair-column",
        )
    return Rows(held, train, test)


def notes_on(rows: Rows, predicted: np.ndarray) -> list[str]:
    """What a reader must know of the rows: few, repeated, or of classes that seem to be in another order.

    Args:
        predicted: class indices that the adapter gives the calibration rows.
    """
    notes, held = [], rows.calibration
    if len(held) < FEW:
        notes.append(f"{len(held)} calibration rows are few; what is fitted on them is uncertain.")
    if rows.train is not None:
        notes += [n.replace("evaluated", "calibrated") for n in repeated(rows.train, held)]
    if rows.test is not None:
        notes += [
            n.replace("trained", "calibrated").replace("training", "calibration")
            for n in repeated(held, rows.test)
        ]
    labels = np.asarray(held.labels)
    counts = np.zeros((len(held.classes),) * 2)
    np.add.at(counts, (labels, predicted), 1)
    order = linear_sum_assignment(-counts)[1]
    right, best = counts.trace() / len(held), counts[np.arange(len(order)), order].sum() / len(held)
    if best > right + 0.2 and right < 0.5:
        notes.append(
            f"The adapter gets {right:.0%} of the calibration rows right, and would get {best:.0%} with its "
            f"classes in another order; --classes names them: {', '.join(held.classes)} was taken."
        )
    return notes
