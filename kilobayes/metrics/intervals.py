"""Intervals from resampling rows (percentile bootstrap), and means over seeds.

The bootstrap says how much a number depends on which rows are in the test set. It says nothing about the
training run: for that, repeat the run with other seeds and use ``over_seeds``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kilobayes.errors import KilobayesError
from kilobayes.metrics.calibration import BINS
from kilobayes.metrics.record import Evaluation
from kilobayes.metrics.table import statistic, statistics

LEVEL = 0.95
"""Coverage of every interval here."""
_CELLS = 4_000_000  # resamples x rows at a time: 32 MB an array


@dataclass(frozen=True)
class Interval:
    """A value computed on all rows, and a 95% percentile interval from resampling the rows.

    The interval of a biased estimator (ECE, MCE) may lie above its value. All three are nan when undefined.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Spread:
    """A number over repeated runs.

    Attributes:
        mean: mean over runs.
        std: standard deviation over runs, divisor n - 1; nan for one run.
        low, high: 95% t-interval of the mean; nan for one run.
        min, max: range over runs.
        n: runs in which the number is defined (not nan).
    """

    mean: float
    std: float
    low: float
    high: float
    min: float
    max: float
    n: int


def resampled_rows(rows: int, resamples: int, gen: np.random.Generator) -> np.ndarray:
    """How often each of ``rows`` rows is in each resample drawn with replacement, ``(resamples, rows)``."""
    drawn = gen.integers(rows, size=(resamples, rows)) + rows * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * rows).reshape(resamples, rows).astype(np.float64)


def percentile_interval(value: float, draws: np.ndarray) -> Interval:
    """The 2.5% and 97.5% percentiles of ``draws`` ``(R,)``, of those that are defined, around ``value``.

    A value that is nan has no interval.
    """
    defined = draws[~np.isnan(draws)]
    if math.isnan(value) or len(defined) == 0:
        return Interval(value, math.nan, math.nan)
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def bootstrap(evaluation: Evaluation, bins: int, resamples: int, seed: int) -> dict[str, Interval]:
    """Every metric of the evaluation with its interval; test rows and OOD rows are resampled separately."""
    table = statistics(evaluation, bins)
    draws: dict[str, list[np.ndarray]] = {key: [] for key in table}
    for rows, ood in _resamples(evaluation, resamples, seed):
        for key, metric in table.items():
            draws[key].append(np.asarray(metric(rows, ood)))
    return {
        key: percentile_interval(float(metric(None, None)), np.concatenate(draws[key]))
        for key, metric in table.items()
    }


def paired_difference(
    metric: str,
    evaluation_a: Evaluation,
    evaluation_b: Evaluation,
    bins: int = BINS,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """``metric`` of b minus that of a, with both resampled by the same draws of the same rows.

    What makes a row hard for both cancels, so the interval is narrower than those of a and b suggest. An
    interval without 0 says that the two differ by more than the choice of test rows explains.

    Args:
        metric: a key of ``summarise``.
        evaluation_a, evaluation_b: two runs on the same test set, row by row.
        bins: bins of the calibration errors.
        resamples: bootstrap resamples, at least 1.
        seed: of the resampling.

    Raises:
        KilobayesError: the test sets differ, or there is no such metric.
    """
    _same_rows(evaluation_a, evaluation_b)
    of_a, of_b = statistic(metric, evaluation_a, bins), statistic(metric, evaluation_b, bins)
    draws = [
        np.asarray(of_b(rows, ood)) - np.asarray(of_a(rows, ood))
        for rows, ood in _resamples(evaluation_a, resamples, seed)
    ]
    return percentile_interval(float(of_b(None, None)) - float(of_a(None, None)), np.concatenate(draws))


def over_seeds(summaries: Sequence[Mapping[str, Interval]]) -> dict[str, Spread]:
    """Mean and spread of each metric over runs that differ in their seed, from the runs' summaries.

    Runs in which a metric is undefined (nan) are left out of it, and of its ``n``.

    Raises:
        KilobayesError: there is no summary, or the summaries do not hold the same metrics.
    """
    if not summaries or any(summary.keys() != summaries[0].keys() for summary in summaries):
        found = f"{len(summaries)} summaries"
        raise KilobayesError("summaries do not hold the same metrics", found, "give runs on the same data")
    return {key: _spread([summary[key].value for summary in summaries]) for key in summaries[0]}


def _spread(values: list[float]) -> Spread:
    from scipy.stats import t

    defined = np.array([value for value in values if not math.isnan(value)])
    n = len(defined)
    if n == 0:
        return Spread(math.nan, math.nan, math.nan, math.nan, math.nan, math.nan, n)
    mean, std, half = float(defined.mean()), math.nan, math.nan
    if n > 1:
        std = float(defined.std(ddof=1))
        half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * std / math.sqrt(n)
    return Spread(mean, std, mean - half, mean + half, float(defined.min()), float(defined.max()), n)


def _resamples(
    evaluation: Evaluation, resamples: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Weights of test rows and of OOD rows, some resamples at a time to bound memory."""
    if resamples < 1:
        raise KilobayesError("an interval needs resamples", f"found {resamples}", "try resamples=1000")
    # One stream for each kind of row: whether there are OOD rows does not change the draws of the test rows.
    gen, ood_gen = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    rows = len(evaluation.labels)
    outside = 0 if evaluation.ood_probs is None else len(evaluation.ood_probs)
    step = max(1, _CELLS // (rows + outside))
    for start in range(0, resamples, step):
        some = min(step, resamples - start)
        yield resampled_rows(rows, some, gen), resampled_rows(outside, some, ood_gen) if outside else None


def _same_rows(a: Evaluation, b: Evaluation) -> None:
    same = np.array_equal(a.labels, b.labels) and a.texts == b.texts and a.ood_texts == b.ood_texts
    sizes = [None if e.ood_probs is None else len(e.ood_probs) for e in (a, b)]
    if not same or sizes[0] != sizes[1]:
        raise KilobayesError(
            f"{a.name!r} and {b.name!r} were not evaluated on the same rows",
            f"{len(a.labels)} and {len(b.labels)} rows whose labels or texts differ",
            "evaluate both on one test set",
        )
