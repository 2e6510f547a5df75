"""Entropies of a posterior predictive, and how well a score separates: unknown from known, wrong from right.

Entropies are in nats and per row. Ties are handled everywhere, so no result depends on the order of the rows.
"""

from __future__ import annotations

import math

import numpy as np

from kilobayes.errors import KilobayesError
from kilobayes.metrics.weighted import TieGroups, Value, counts, ratio


def entropy(probs: np.ndarray) -> np.ndarray:
    """H[p] = -sum_c p_c ln p_c of ``(..., C)``, nats, ``(...)``; 0 ln 0 is 0."""
    probs = np.asarray(probs, dtype=np.float64)
    return -(probs * np.log(np.where(probs > 0, probs, 1.0))).sum(axis=-1)


def predictive_entropy(member_probs: np.ndarray) -> np.ndarray:
    """H[mean_s p_s] of ``(S, N, C)``, nats ``(N,)``: all uncertainty."""
    return entropy(np.mean(_stack(member_probs), axis=0))


def expected_entropy(member_probs: np.ndarray) -> np.ndarray:
    """mean_s H[p_s] of ``(S, N, C)``, nats ``(N,)``: what would remain were the adapter known."""
    return entropy(_stack(member_probs)).mean(axis=0)


def mutual_information(member_probs: np.ndarray) -> np.ndarray:
    """H[mean_s p_s] - mean_s H[p_s] of ``(S, N, C)``, nats ``(N,)``: how much members disagree.

    Source: arXiv:1112.5745. Between 0 and ln S; 0 for one member. Rounding below 0 is cut off.
    """
    return np.maximum(predictive_entropy(member_probs) - expected_entropy(member_probs), 0.0)


def auroc(
    scores_out: np.ndarray,
    scores_in: np.ndarray,
    weights_out: np.ndarray | None = None,
    weights_in: np.ndarray | None = None,
) -> Value:
    """P(score of an out row > score of an in row) + P(equal) / 2; nan when either side has no row.

    Args:
        scores_out: ``(M,)``, the positive class, which should score higher.
        scores_in: ``(N,)``.
        weights_out, weights_in: how often each row counts, see ``weighted``.
    """
    outside, inside = _two_sides(scores_out, scores_in, weights_out, weights_in)
    below = np.cumsum(inside, axis=-1) - inside
    wins = (outside * (below + inside / 2)).sum(axis=-1)
    return ratio(wins, outside.sum(axis=-1) * inside.sum(axis=-1))


def aupr(
    scores_out: np.ndarray,
    scores_in: np.ndarray,
    weights_out: np.ndarray | None = None,
    weights_in: np.ndarray | None = None,
) -> Value:
    """Average precision with the out rows as positives: sum over thresholds of (gain in recall) * precision.

    No interpolation; arguments as for ``auroc``. Chance level is M / (M + N), so it depends on the mix. nan
    when either side has no row.
    """
    outside, inside = _two_sides(scores_out, scores_in, weights_out, weights_in)
    descending = outside[..., ::-1]
    found = np.cumsum(descending, axis=-1)
    flagged = found + np.cumsum(inside[..., ::-1], axis=-1)
    area = (descending * found / np.maximum(flagged, 1.0)).sum(axis=-1)
    return ratio(area * (inside.sum(axis=-1) > 0), outside.sum(axis=-1) * (inside.sum(axis=-1) > 0))


def error_auroc(confidence: np.ndarray, correct: np.ndarray, weights: np.ndarray | None = None) -> Value:
    """Does confidence tell right from wrong? The AUROC of a right row being more confident than a wrong one.

    0.5 is chance. When all rows are right, or all wrong, there is nothing to tell apart: the answer is nan.
    """
    confidence, correct = _pair(confidence, correct)
    weight = counts(weights, len(correct))
    return auroc(confidence, confidence, weight * correct, weight * (1.0 - correct))


def risk_coverage(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The error rate among the k most confident rows, for k = 1 to N (arXiv:1705.08500).

    Among rows of equal confidence each counts with the error rate of them all, which is the mean over the
    ways to order them.

    Returns:
        coverage: k / N, ``(N,)``.
        risk: error rate ``(N,)``.
    """
    confidence, correct = _pair(confidence, correct)
    groups = TieGroups(-confidence)
    size = groups.sum(np.ones(len(correct)))
    rate = groups.sum(1.0 - correct) / size
    kept = np.arange(1, len(correct) + 1)
    return kept / len(correct), np.cumsum(np.repeat(rate, size.astype(np.int64))) / kept


def aurc(confidence: np.ndarray, correct: np.ndarray, weights: np.ndarray | None = None) -> Value:
    """Area under the risk-coverage curve: the mean of its N risks, in [0, 1]; lower is better."""
    size, errors = _descending(confidence, correct, weights)
    kept = np.cumsum(size, axis=-1)
    rate = errors / np.maximum(size, 1.0)
    before, wrong_before = kept - size, np.cumsum(errors, axis=-1) - errors
    # Within a group the risk at k is (wrong_before + (k - before) rate) / k; its sum needs sums of 1 / k.
    most = int(kept[..., -1].max())
    harmonic = np.r_[0.0, np.cumsum(1.0 / np.arange(1, most + 1))]
    inverse = harmonic[kept.astype(np.int64)] - harmonic[before.astype(np.int64)]
    return ratio((rate * size + (wrong_before - before * rate) * inverse).sum(axis=-1), kept[..., -1])


def error_at_coverage(
    confidence: np.ndarray, correct: np.ndarray, coverage: float, weights: np.ndarray | None = None
) -> Value:
    """The risk at the smallest k with k / N at least ``coverage``: the error rate when the rest is passed on.

    Raises:
        KilobayesError: ``coverage`` is not in (0, 1].
    """
    if not 0 < coverage <= 1:
        raise KilobayesError("coverage is a share of rows", f"found {coverage}", "give a number in (0, 1]")
    size, errors = _descending(confidence, correct, weights)
    kept, wrong = np.cumsum(size, axis=-1), np.cumsum(errors, axis=-1)
    # 0.28 of 25 rows is 7 rows, though the product comes out as 7.000000000000001.
    wanted = np.maximum(np.ceil(kept[..., -1:] * coverage - 1e-9), 1.0)
    here = (kept < wanted).sum(axis=-1, keepdims=True)

    def at(amounts: np.ndarray) -> np.ndarray:
        return np.take_along_axis(amounts, here, axis=-1)

    rate = at(errors) / np.maximum(at(size), 1.0)
    beyond = at(wrong) - (at(kept) - wanted) * rate
    return (beyond / wanted)[..., 0][()]


def _two_sides(
    scores_out: np.ndarray,
    scores_in: np.ndarray,
    weights_out: np.ndarray | None,
    weights_in: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of either side in each group of equal score, ``(..., G)``."""
    groups = TieGroups(np.concatenate([scores_out, scores_in]))
    outside, inside = counts(weights_out, len(scores_out)), counts(weights_in, len(scores_in))
    return (
        groups.sum(np.concatenate([outside, np.zeros((*outside.shape[:-1], len(scores_in)))], axis=-1)),
        groups.sum(np.concatenate([np.zeros((*inside.shape[:-1], len(scores_out))), inside], axis=-1)),
    )


def _descending(
    confidence: np.ndarray, correct: np.ndarray, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and errors in each group of equal confidence, most confident first, ``(..., G)``."""
    confidence, correct = _pair(confidence, correct)
    weight = counts(weights, len(correct))
    groups = TieGroups(-confidence)
    return groups.sum(weight), groups.sum(weight * (1.0 - correct))


def _pair(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    confidence, correct = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    if confidence.ndim != 1 or confidence.shape != correct.shape or len(correct) == 0:
        found = f"shapes {confidence.shape} and {correct.shape}"
        raise KilobayesError(
            "confidence and correct do not fit", found, "give two of shape (N,), N at least 1"
        )
    return confidence, correct


def _stack(member_probs: np.ndarray) -> np.ndarray:
    member_probs = np.asarray(member_probs, dtype=np.float64)
    if member_probs.ndim != 3 or math.prod(member_probs.shape) == 0:
        raise KilobayesError(
            "probabilities of members have three axes", f"shape {member_probs.shape}", "give (S, N, C)"
        )
    return member_probs
