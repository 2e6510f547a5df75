"""Every metric of a run with its interval, as tables and files show it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from kilobayes.errors import KilobayesError
from kilobayes.metrics.calibration import BINS
from kilobayes.metrics.intervals import LEVEL, Interval, Spread, bootstrap, over_seeds, paired_difference
from kilobayes.metrics.record import Evaluation
from kilobayes.metrics.table import DEFINITIONS

__all__ = ["Evaluation", "Interval", "Spread", "over_seeds", "paired_difference", "summarise", "to_json"]


def summarise(
    evaluation: Evaluation, bins: int = BINS, resamples: int = 1000, seed: int = 0
) -> dict[str, Interval]:
    """Every metric of ``DEFINITIONS`` that the evaluation allows, with a 95% bootstrap interval over rows.

    Args:
        evaluation: one run; without OOD rows the ``ood_`` metrics are left out.
        bins: bins of the calibration errors.
        resamples: bootstrap resamples, at least 1.
        seed: of the resampling; test sets of equal size are resampled alike.
    """
    return bootstrap(evaluation, bins, resamples, seed)


def to_json(
    evaluations: Sequence[Evaluation],
    summaries: Sequence[Mapping[str, Interval]],
    meta: Mapping[str, Any],
    bins: int = BINS,
    resamples: int = 1000,
) -> dict[str, Any]:
    """What ``metrics.json`` holds: for each run its metrics with intervals, and what every number means.

    Undefined numbers (nan) become null, which is what JSON has for them. ``bins`` and ``resamples`` are those
    given to ``summarise``; ``meta`` is passed on as it is.

    Raises:
        KilobayesError: not one summary for each evaluation.
    """
    if len(evaluations) != len(summaries):
        found = f"{len(evaluations)} evaluations and {len(summaries)} summaries"
        raise KilobayesError(
            "each evaluation needs its summary", found, "give one summary for each evaluation"
        )
    runs = [
        {
            "name": evaluation.name,
            "spec": dict(evaluation.spec),
            "classes": list(evaluation.classes),
            "rows": len(evaluation.labels),
            "ood_rows": 0 if evaluation.ood_probs is None else len(evaluation.ood_probs),
            "cost": {key: _plain(value) for key, value in evaluation.cost.items()},
            "metrics": {
                key: {part: _plain(number) for part, number in asdict(interval).items()}
                for key, interval in summary.items()
            },
        }
        for evaluation, summary in zip(evaluations, summaries)
    ]
    named = {key for summary in summaries for key in summary}
    return {
        "meta": dict(meta),
        "bins": bins,
        "interval": f"{LEVEL:.0%} percentile bootstrap over rows, {resamples} resamples",
        "definitions": {key: text.format(bins=bins) for key, text in DEFINITIONS.items() if key in named},
        "runs": runs,
    }


def _plain(value: float) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
