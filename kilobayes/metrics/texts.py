"""The record of one language model on some documents, which tables, files and reports show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from kilobayes.metrics.intervals import LEVEL, Interval
from kilobayes.metrics.language import BINS, TokenScores, comparable, paired_difference

DEFINITIONS = {
    "perplexity": "exponential of the negative log-likelihood per token",
    "nll": "negative log-likelihood, nats, mean over learned tokens",
    "bits_per_byte": "negative log-likelihood in bits, over the UTF-8 bytes of the learned text",
    "accuracy": "share of tokens that were the most probable one",
    "confidence": "probability of the most probable token, mean over tokens",
    "ece": "expected calibration error of the most probable token, {bins} bins of equal width, closed on the "
    "right",
    "entropy": "predictive entropy, nats, mean over tokens",
    "mutual_information": "mutual information of token and posterior sample, nats, mean over tokens",
    "ood_auroc": "chance that an OOD document has a higher mean entropy than a test document",
    "ood_auroc_mi": "chance that an OOD document has a higher mean mutual information than a test document",
}
"""One line for each figure; ``{bins}`` is their number. Those of OOD documents start with ``ood_``."""
HIGHER_IS_BETTER = frozenset({"accuracy", "ood_auroc", "ood_auroc_mi"})
LOWER_IS_BETTER = frozenset({"nll", "perplexity", "bits_per_byte", "ece"})


@dataclass(frozen=True, eq=False)
class Excerpt:
    """The beginning of a document, token by token.

    Attributes:
        outside: whether it is out of distribution.
        pieces: text of each token.
        nll, entropy, information: nats of each token, nan where it was read and not scored.
    """

    outside: bool
    pieces: list[str]
    nll: np.ndarray
    entropy: np.ndarray
    information: np.ndarray


@dataclass(frozen=True, eq=False)
class TextEvaluation:
    """One run of a language model on some documents, and perhaps on documents of another kind.

    Attributes:
        name: what tables and plots call the run.
        scores, ood: of every learned token of the two.
        excerpts: of some of the documents.
        cost: numbers such as ``seconds``, ``peak_bytes`` and ``stored_bytes``.
        spec: what was run (adapter, posterior, model, seed), as shown in the report.
    """

    name: str
    scores: TokenScores
    ood: TokenScores | None = None
    excerpts: list[Excerpt] = field(default_factory=list)
    cost: Mapping[str, float] = field(default_factory=dict)
    spec: Mapping[str, str] = field(default_factory=dict)


def differences(evaluations: Sequence[TextEvaluation]) -> list[dict[str, Interval]]:
    """Of each run but the first, its figures less those of the first, where they may be paired."""
    first = evaluations[0].scores
    return [
        {key: paired_difference(key, first, one.scores) for key in comparable(first, one.scores)}
        for one in evaluations[1:]
    ]


def to_json(
    evaluations: Sequence[TextEvaluation],
    summaries: Sequence[Mapping[str, Interval]],
    meta: Mapping[str, Any],
    resamples: int = 1000,
) -> dict[str, Any]:
    """What ``metrics.json`` holds of language models; undefined numbers are null."""
    runs: list[dict[str, Any]] = [
        {
            "name": one.name,
            "spec": dict(one.spec),
            **counts(one.scores),
            "ood_documents": 0 if one.ood is None else len(one.ood.bytes),
            "cost": {key: _plain(value) for key, value in one.cost.items()},
            "metrics": _plain_intervals(summary),
        }
        for one, summary in zip(evaluations, summaries, strict=True)
    ]
    for run, found in zip(runs[1:], differences(evaluations), strict=True):
        run["less_first"] = _plain_intervals(found)
    named = {key.removeprefix("ood_") for summary in summaries for key in summary} | set().union(*summaries)
    return {
        "task": "lm",
        "meta": dict(meta),
        "bins": BINS,
        "interval": f"{LEVEL:.0%} percentile bootstrap over documents, {resamples} resamples",
        "definitions": {key: text.format(bins=BINS) for key, text in DEFINITIONS.items() if key in named},
        "runs": runs,
    }


def counts(scores: TokenScores) -> dict[str, int]:
    """How much was scored."""
    return {"documents": len(scores.bytes), "tokens": len(scores.nll), "bytes": int(scores.bytes.sum())}


def _plain_intervals(found: Mapping[str, Interval]) -> dict[str, dict[str, float | None]]:
    return {key: {part: _plain(v) for part, v in asdict(one).items()} for key, one in found.items()}


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
