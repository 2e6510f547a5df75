"""How far stated confidence is from accuracy, by bins of confidence.

The confidence of a row is its highest probability; the row is right when that class is the label. Two schemes
of bins:

- ``"width"``: ``bins`` intervals of equal width, closed on the right: bin i is (i / bins, (i + 1) / bins],
  and the first also holds 0. Confidence exactly 1.0 is in the last bin.
- ``"mass"``: bins of as equal counts as ties allow: a row is in bin floor(bins * share of rows less confident
  than it). Rows of equal confidence are always together, so no result depends on the order of the rows.

Both estimators are biased upwards for few rows (arXiv:2012.08668; a perfectly calibrated model does not get
0), and a bootstrap adds to that bias: a percentile interval of ECE may lie above the value it belongs to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from kilobayes.errors import KilobayesError, nearest
from kilobayes.metrics.weighted import TieGroups, Value, checked, counts, ratio

BINS = 15
"""Default number of bins."""
Scheme = Literal["width", "mass"]


@dataclass(frozen=True, eq=False)
class Reliability:
    """A reliability diagram in numbers; all arrays go by bin, from low to high confidence.

    Attributes:
        scheme: "width" or "mass".
        edges: ``(bins + 1,)``. By width the bins' limits from 0 to 1; by mass the lowest confidence, then the
            highest confidence in each bin (an empty bin has no width).
        confidence: mean confidence ``(bins,)``, nan in an empty bin.
        accuracy: share of right rows ``(bins,)``, nan in an empty bin.
        count: rows ``(bins,)``.
    """

    scheme: Scheme
    edges: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray


def ece(
    probs: np.ndarray,
    labels: np.ndarray,
    bins: int = BINS,
    scheme: Scheme = "width",
    weights: np.ndarray | None = None,
) -> Value:
    """Expected calibration error, sum over bins of n_b / N |accuracy_b - confidence_b|, in [0, 1].

    Source: arXiv:1706.04599.

    Args:
        probs: ``(N, C)``.
        labels: ``(N,)``.
        bins: number of bins, at least 1.
        scheme: "width" or "mass", see above.
        weights: how often each row counts, see ``weighted``.

    Raises:
        KilobayesError: shapes disagree, ``bins`` is below 1 or the scheme is unknown.
    """
    gap, count = _gaps(probs, labels, bins, scheme, weights)
    return ratio(np.abs(gap).sum(axis=-1), count.sum(axis=-1))


def mce(
    probs: np.ndarray,
    labels: np.ndarray,
    bins: int = BINS,
    scheme: Scheme = "width",
    weights: np.ndarray | None = None,
) -> Value:
    """Maximum calibration error: the largest |accuracy_b - confidence_b| of a bin with rows, in [0, 1]."""
    gap, count = _gaps(probs, labels, bins, scheme, weights)
    return (np.abs(gap) / np.maximum(count, 1.0)).max(axis=-1)


def reliability(
    probs: np.ndarray, labels: np.ndarray, bins: int = BINS, scheme: Scheme = "width"
) -> Reliability:
    """Confidence, accuracy and count of each bin; ``ece`` is the count-weighted mean |difference|."""
    confidence, correct = top(probs, labels)
    groups = TieGroups(confidence)
    where, size = _bin_of(groups, counts(None, len(correct)), bins, scheme), groups.sum(np.ones(len(correct)))
    count = np.bincount(where, size, bins)
    stated = ratio(np.bincount(where, groups.sum(confidence), bins), count)
    right = ratio(np.bincount(where, groups.sum(correct), bins), count)
    if scheme == "width":
        edges = np.linspace(0.0, 1.0, bins + 1)
    else:
        last = np.searchsorted(where, np.arange(bins), side="right") - 1
        edges = np.r_[groups.values[0], groups.values[np.maximum(last, 0)]]
    return Reliability(scheme, edges, np.asarray(stated), np.asarray(right), count.astype(np.int64))


def top(probs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Confidence (highest probability) and correctness (1.0 or 0.0) of each row, both ``(N,)``."""
    probs, labels = checked(probs, labels)
    return probs.max(axis=1), (probs.argmax(axis=1) == labels).astype(np.float64)


def _gaps(
    probs: np.ndarray, labels: np.ndarray, bins: int, scheme: Scheme, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Of each bin, the sum of correct minus confidence and the number of rows, both ``(..., bins)``."""
    confidence, correct = top(probs, labels)
    weight = counts(weights, len(correct))
    groups = TieGroups(confidence)
    size, gap = groups.sum(weight), groups.sum(weight * (correct - confidence))
    shape = (*size.shape[:-1], bins)
    resamples = int(np.prod(size.shape[:-1]))
    # One flat histogram serves all resamples: each gets its own run of `bins` cells.
    where = _bin_of(groups, weight, bins, scheme) + bins * np.arange(resamples).reshape(*size.shape[:-1], 1)
    cells = np.broadcast_to(where, size.shape).ravel()
    total = resamples * bins
    return (
        np.bincount(cells, gap.ravel(), total).reshape(shape),
        np.bincount(cells, size.ravel(), total).reshape(shape),
    )


def _bin_of(groups: TieGroups, weight: np.ndarray, bins: int, scheme: Scheme) -> np.ndarray:
    """The bin of each group, ``(G,)`` by width and ``(..., G)`` by mass."""
    if bins < 1:
        raise KilobayesError("bins must be at least 1", f"found {bins}", "try bins=15")
    if scheme == "width":
        edges = np.linspace(0.0, 1.0, bins + 1)
        # Probabilities from float32 may exceed 1 by rounding.
        return np.clip(np.searchsorted(edges, groups.values, side="left") - 1, 0, bins - 1)
    if scheme == "mass":
        size = groups.sum(weight)
        below = np.cumsum(size, axis=-1) - size
        # Groups at the top that no row of a resample fell into have below = all rows; they weigh nothing.
        share = np.floor(below * bins / size.sum(axis=-1, keepdims=True))
        return np.minimum(share, bins - 1).astype(np.int64)
    guess = nearest(str(scheme), get_args(Scheme)) or "width"
    raise KilobayesError("unknown scheme of bins", f"found {scheme!r}", f'try scheme="{guess}"')
