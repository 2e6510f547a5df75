"""Row weights: how often each row counts.

Every metric here takes ``weights``, whole numbers with the rows on the last axis: None (each row once),
``(N,)``, or ``(R, N)`` for R bootstrap resamples at once, where a resample is how often it drew each row. The
answer is one number, or R of them. So the value on all rows and its bootstrap come from the same code,
without copying a row.
"""

from __future__ import annotations

import numpy as np

from kilobayes.errors import KilobayesError

Value = np.float64 | np.ndarray
"""One number (a ``numpy.float64``, which is a ``float``), or ``(R,)`` numbers for R resamples."""


def counts(weights: np.ndarray | None, rows: int) -> np.ndarray:
    """The weights as floats, ones when None; raises KilobayesError when they are not of ``rows`` rows."""
    if weights is None:
        return np.ones(rows)
    array = np.asarray(weights, dtype=np.float64)
    if array.shape[-1:] != (rows,):
        raise KilobayesError("the weights do not fit the rows", f"shape {array.shape}", f"give (..., {rows})")
    return array


def average(values: np.ndarray, weights: np.ndarray | None) -> Value:
    """Weighted mean of one number a row, ``(N,)`` to a number."""
    weight = counts(weights, len(values))
    return ratio(weight @ values, weight.sum(axis=-1))


def ratio(numerator: Value, denominator: Value) -> Value:
    """The quotient, and nan where the denominator is 0."""
    some = np.asarray(denominator) > 0
    return np.where(some, numerator / np.where(some, denominator, 1.0), np.nan)[()]


class TieGroups:
    """Rows put together by equal score, in ascending order of score: G groups of N rows.

    Working on groups makes whatever follows independent of the rows' order. Raises KilobayesError on nan.

    Attributes:
        values: the G distinct scores, ascending.
    """

    def __init__(self, scores: np.ndarray) -> None:
        self._order = np.argsort(scores, kind="stable")
        ordered = np.asarray(scores)[self._order]
        if np.isnan(ordered[-1:]).any():  # nan sorts last
            raise KilobayesError("scores cannot be ranked", "found nan", "look for nan in the predictions")
        self._starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        self.values = ordered[self._starts]

    def sum(self, amounts: np.ndarray) -> np.ndarray:
        """The sum of ``(..., N)`` within each group, ``(..., G)``."""
        return np.add.reduceat(amounts[..., self._order], self._starts, axis=-1)


def checked(probs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities ``(N, C)`` as float64 and labels ``(N,)``.

    Raises:
        KilobayesError: the shapes disagree, there is no row, a probability is not finite, or a label no
            class.
    """
    probs, labels = np.asarray(probs, dtype=np.float64), np.asarray(labels)
    if probs.ndim != 2 or labels.shape != probs.shape[:1] or probs.size == 0:
        found = f"shapes {probs.shape} and {labels.shape}"
        raise KilobayesError(
            "probabilities and labels do not fit", found, "give (N, C) and (N,), N at least 1"
        )
    if not np.isfinite(probs).all():
        raise KilobayesError(
            "probabilities must be finite", "found nan or infinity", "look at the loss of the run"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= probs.shape[1]:
        found = f"{labels.dtype} from {labels.min()} to {labels.max()}"
        raise KilobayesError(
            "labels are not classes", found, f"give whole numbers from 0 to {probs.shape[1] - 1}"
        )
    return probs, labels
