r"""Scores of a language model on text: how well it predicts, and whether it knows how well.

Over learned tokens, with probabilities averaged over draws of the posterior:

* ``nll``: mean negative log-likelihood, nats per token; ``perplexity`` is its exponential;
* ``bits_per_byte``: the sum in bits over the UTF-8 bytes of the learned text, comparable between tokenizers;
* ``accuracy``, ``confidence``, ``ece``: of the most probable token; 15 bins of equal width;
* ``entropy``, ``mutual_information``: means over tokens, nats;
* ``ood_auroc``, ``ood_auroc_mi``: telling documents of another kind by their mean entropy, or mutual
  information.

Intervals are percentile bootstraps over documents: tokens of one are far from independent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kilobayes.errors import KilobayesError
from kilobayes.metrics.calibration import Reliability
from kilobayes.metrics.intervals import Interval, percentile_interval, resampled_rows
from kilobayes.metrics.uncertainty import auroc

BINS = 15
LN2 = float(np.log(2.0))
DIFFERENCES = ("nll", "perplexity", "bits_per_byte", "accuracy", "ece", "entropy", "mutual_information")
Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Every learned token of some documents, in their order.

    Attributes:
        nll: ``(n,)`` nats of the label under the averaged probabilities.
        confidence: ``(n,)`` probability of the most probable token.
        right: ``(n,)`` whether that is the label.
        entropy, information: ``(n,)`` of the averaged probabilities, and its share that draws disagree about.
        document: ``(n,)`` which document a token is of.
        bytes: ``(D,)`` UTF-8 bytes of the learned text, by document.
    """

    nll: np.ndarray
    confidence: np.ndarray
    right: np.ndarray
    entropy: np.ndarray
    information: np.ndarray
    document: np.ndarray
    bytes: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """Learned tokens of each document ``(D,)``."""
        return np.bincount(self.document, minlength=len(self.bytes))

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sums over the tokens of each document ``(D,)``."""
        return np.bincount(self.document, weights=values.astype(np.float64), minlength=len(self.bytes))

    def means(self, values: np.ndarray) -> np.ndarray:
        """Means over the tokens of each document that has any."""
        there = self.counts > 0
        return self.sums(values)[there] / self.counts[there]

    def binned(self, values: np.ndarray, bins: int) -> np.ndarray:
        """Sums over tokens by document and bin of confidence ``(D, bins)``; bins are closed on the right."""
        at = np.clip(np.ceil(self.confidence.astype(np.float64) * bins).astype(int) - 1, 0, bins - 1)
        shape = (len(self.bytes), bins)
        weights = values.astype(np.float64)
        return np.bincount(self.document * bins + at, weights, shape[0] * bins).reshape(shape)


def reliability(
    scores: TokenScores, bins: int = BINS, resamples: int = 1000, seed: int = 0
) -> tuple[Reliability, list[Interval]]:
    """Confidence and accuracy of the most probable token by bins of equal width, and each bin's accuracy with
    a bootstrap interval over documents."""
    right, sure = scores.binned(scores.right, bins), scores.binned(scores.confidence, bins)
    count = scores.binned(np.ones(len(scores.nll)), bins)
    weights = resampled_rows(len(scores.bytes), resamples, np.random.default_rng(seed))
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = (weights @ right) / (weights @ count)
        accuracy, confidence = (part.sum(axis=0) / count.sum(axis=0) for part in (right, sure))
    found = Reliability(
        "width", np.linspace(0.0, 1.0, bins + 1), confidence, accuracy, count.sum(axis=0).astype(np.int64)
    )
    return found, [percentile_interval(float(accuracy[i]), drawn[:, i]) for i in range(bins)]


def summarise(
    scores: TokenScores,
    ood: TokenScores | None = None,
    bins: int = BINS,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """The figures above with 95% intervals; those of ``ood`` start with ``ood_``."""
    gen = np.random.default_rng(seed)
    out = _figures(scores, bins, resampled_rows(len(scores.bytes), resamples, gen))
    if ood is None:
        return out
    there = _figures(ood, bins, resampled_rows(len(ood.bytes), resamples, gen))
    out |= {f"ood_{k}": v for k, v in there.items()}
    for key, name in (("ood_auroc", "entropy"), ("ood_auroc_mi", "information")):
        own, other = (s.means(getattr(s, name)) for s in (scores, ood))
        draws = [
            auroc(gen.choice(other, size=len(other)), gen.choice(own, size=len(own)))
            for _ in range(min(resamples, 200))
        ]
        out[key] = percentile_interval(float(auroc(other, own)), np.array(draws, dtype=np.float64))
    return out


def comparable(a: TokenScores, b: TokenScores) -> tuple[str, ...]:
    """The figures that may be compared document by document.

    All where the same tokens were scored, only bits per byte where the same texts were cut into other tokens,
    none where the texts differ.
    """
    if not np.array_equal(a.bytes, b.bytes):
        return ()
    return tuple(DIFFERENCES) if np.array_equal(a.counts, b.counts) else ("bits_per_byte",)


def paired_difference(
    metric: str, a: TokenScores, b: TokenScores, bins: int = BINS, resamples: int = 1000, seed: int = 0
) -> Interval:
    """``metric`` of b minus that of a, with both resampled by the same draws of the same documents.

    Raises:
        KilobayesError: a figure that may not be compared between the two.
    """
    if metric not in comparable(a, b):
        raise KilobayesError(
            f"{metric} of the two cannot be compared document by document",
            f"{len(a.nll)} and {len(b.nll)} tokens of {len(a.bytes)} and {len(b.bytes)} documents",
            "score the same texts with one tokenizer; bits_per_byte with any",
        )
    weights = resampled_rows(len(a.bytes), resamples, np.random.default_rng(seed))
    of_a, of_b = statistics(a, bins)[metric], statistics(b, bins)[metric]
    every = np.ones((1, len(a.bytes)))
    return percentile_interval(float((of_b(every) - of_a(every))[0]), of_b(weights) - of_a(weights))


def _figures(scores: TokenScores, bins: int, weights: np.ndarray) -> dict[str, Interval]:
    every = np.ones((1, len(scores.bytes)))
    table = statistics(scores, bins)
    return {k: percentile_interval(float(f(every)[0]), f(weights)) for k, f in table.items()}


def statistics(scores: TokenScores, bins: int = BINS) -> dict[str, Statistic]:
    """The figures by name, as functions of how often each document counts ``(R, D)``, giving ``(R,)``."""
    count, size = scores.counts.astype(np.float64), scores.bytes.astype(np.float64)
    gaps = scores.binned(scores.right - scores.confidence.astype(np.float64), bins)
    nats = scores.sums(scores.nll)

    def ratio(total: np.ndarray, over: np.ndarray) -> Statistic:
        def at(w: np.ndarray) -> np.ndarray:
            with np.errstate(divide="ignore", invalid="ignore"):
                return (w @ total) / (w @ over)

        return at

    def ece(w: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.abs(w @ gaps).sum(axis=-1) / (w @ count)

    per_token = ratio(nats, count)
    return {
        "nll": per_token,
        "perplexity": lambda w: np.exp(per_token(w)),
        "bits_per_byte": ratio(nats / LN2, size),
        "accuracy": ratio(scores.sums(scores.right), count),
        "confidence": ratio(scores.sums(scores.confidence), count),
        "ece": ece,
        "entropy": ratio(scores.sums(scores.entropy), count),
        "mutual_information": ratio(scores.sums(scores.information), count),
    }
