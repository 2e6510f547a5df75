"""Scores of predicted classes (accuracy, macro F1, Matthews) and of probabilities (NLL, Brier).

Throughout: ``probs`` is ``(N, C)``, ``labels`` ``(N,)``, the prediction the first class of highest
probability, and ``weights`` as in ``weighted``. Raises KilobayesError when shapes disagree.
"""

from __future__ import annotations

import numpy as np

from kilobayes.metrics.weighted import TieGroups, Value, average, checked, counts, ratio

EPSILON = 1e-12
"""Floor of a probability inside a logarithm: one row costs at most -ln 1e-12 = 27.6 nats."""


def accuracy(probs: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> Value:
    """Share of rows whose prediction is the label, in [0, 1]."""
    probs, labels = checked(probs, labels)
    return average((probs.argmax(axis=1) == labels).astype(np.float64), weights)


def macro_f1(probs: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> Value:
    """Mean of F1 = 2 TP / (2 TP + FP + FN) over the classes that occur as label or prediction."""
    true, predicted, right = _by_class(probs, labels, weights)
    each = ratio(2.0 * right, true + predicted)
    # A class that a resample lost counts neither as 0 nor as 1.
    return np.nanmean(each, axis=-1)


def matthews(probs: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> Value:
    """Matthews correlation of label and prediction for C classes (R_K), in [-1, 1].

    With t_k rows of class k, p_k predicted as k, c right and s in all:
    (c s - sum t_k p_k) / sqrt((s^2 - sum p_k^2) (s^2 - sum t_k^2)); 0 when all labels or all predictions are
    alike.
    """
    true, predicted, right = _by_class(probs, labels, weights)
    total = true.sum(axis=-1)
    spread = (total**2 - (predicted**2).sum(axis=-1)) * (total**2 - (true**2).sum(axis=-1))
    covariance = right.sum(axis=-1) * total - (true * predicted).sum(axis=-1)
    return np.where(spread > 0, covariance / np.sqrt(np.where(spread > 0, spread, 1.0)), 0.0)[()]


def nll(probs: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> Value:
    """Negative log-likelihood, nats, mean over rows; probabilities below ``EPSILON`` count as ``EPSILON``."""
    probs, labels = checked(probs, labels)
    return average(-np.log(np.maximum(probs[np.arange(len(labels)), labels], EPSILON)), weights)


def brier(probs: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> Value:
    """Squared distance to the one-hot label, summed over classes, mean over rows, in [0, 2]."""
    probs, labels = checked(probs, labels)
    return average(((probs - np.eye(probs.shape[1])[labels]) ** 2).sum(axis=1), weights)


def _by_class(
    probs: np.ndarray, labels: np.ndarray, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each class the rows that have it, that are predicted it, and both, each ``(..., C)``."""
    probs, labels = checked(probs, labels)
    predicted, weight = probs.argmax(axis=1), counts(weights, len(labels))

    def total(classes: np.ndarray, amounts: np.ndarray) -> np.ndarray:
        groups = TieGroups(classes)
        table = np.zeros((*amounts.shape[:-1], probs.shape[1]))
        table[..., groups.values] = groups.sum(amounts)
        return table

    return total(labels, weight), total(predicted, weight), total(labels, weight * (predicted == labels))
