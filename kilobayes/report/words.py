"""Numbers in words: formats, the table of results, and what may honestly be concluded from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kilobayes.metrics.evaluation import Evaluation, Interval
from kilobayes.metrics.table import HIGHER_IS_BETTER, LOWER_IS_BETTER

Summary = Mapping[str, Interval]


def number(value: float) -> str:
    """Three decimals; infinities and missing values as signs."""
    if math.isnan(value):
        return "–"
    return (f"{value:.3f}" if math.isfinite(value) else "∞" if value > 0 else "-∞").replace("-", "−")


def percent(value: float) -> str:
    """A share as a percentage with one decimal."""
    return f"{100 * value:.1f}%" if math.isfinite(value) else number(value)


def probability(value: float) -> str:
    """A percentage that never rounds doubt away: 1 - 1e-5 is ">99.9%", and only 1 itself is "100.0%"."""
    if 0.9995 <= value < 1:
        return ">99.9%"
    return "<0.1%" if 0 < value < 0.0005 else percent(value)


def size(value: float) -> str:
    """Bytes in units of a thousand: 812 B, 4.10 kB, 1.23 MB."""
    if not math.isfinite(value):
        return number(value)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"


def duration(seconds: float) -> str:
    """Seconds as a person says them: 3.2 s, 42 s, 3 min 20 s, 1 h 12 min."""
    if not math.isfinite(seconds):
        return number(seconds)
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    whole = round(seconds)
    return (
        f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
    )


FORMATS = {"number": number, "percent": percent, "size": size, "duration": duration}


TITLES = {
    "accuracy": "Accuracy",
    "macro_f1": "Macro F1",
    "nll": "NLL (nats)",
    "ece": "ECE ({bins} bins)",
    "brier": "Brier",
    "error_at_80": "Error at 80% coverage",
    "ood_auroc": "OOD AUROC",
    "mcc": "MCC",
    "ece_mass": "ECE ({bins} bins of equal mass)",
    "mce": "MCE ({bins} bins)",
    "entropy": "Entropy (nats)",
    "mutual_information": "Mutual information (nats)",
    "error_auroc": "Error AUROC",
    "aurc": "AURC",
    "ood_aupr": "OOD AUPR",
    "ood_auroc_mi": "OOD AUROC by mutual information",
}
"""What the page calls each metric."""
MAIN = ("accuracy", "macro_f1", "nll", "ece", "brier", "error_at_80", "ood_auroc")
"""The metrics of the first table; the others go into a second one."""


@dataclass(frozen=True)
class Column:
    """A column of a table; ``sign`` is 1 where higher is better, -1 where lower is, 0 where neither is."""

    key: str
    title: str
    form: str
    sign: int
    cost: bool = False

    @property
    def better(self) -> str:
        return {1: "higher is better", -1: "lower is better"}.get(self.sign, "")


@dataclass(frozen=True)
class Cell:
    """A value, its interval, a ``mark`` ("best", "overlaps", "") and a ``span``: low, value, high in %."""

    value: str
    interval: str
    mark: str
    span: tuple[float, float, float] | None


def table(
    evaluations: Sequence[Evaluation], summaries: Sequence[Summary], bins: int, main: bool = True
) -> list[tuple[Column, list[Cell]]]:
    """The columns that have a value, from left to right, each with one cell an arm.

    Args:
        main: the metrics of ``MAIN`` and the costs; otherwise all other metrics.
    """
    return filled(_columns(bins, main), [evaluation.cost for evaluation in evaluations], summaries)


COSTS = [
    Column("stored_bytes", "Stored", "size", -1, cost=True),
    Column("seconds", "Time", "duration", -1, cost=True),
]


def filled(
    columns: Sequence[Column], costs: Sequence[Mapping[str, float]], summaries: Sequence[Summary]
) -> list[tuple[Column, list[Cell]]]:
    """The columns that have a value, each with one cell an arm."""
    found = []
    for column in columns:
        values = [_interval(column, *arm) for arm in zip(costs, summaries, strict=True)]
        if any(not math.isnan(value.value) for value in values):
            found.append((column, _cells(column, values)))
    return found


def best(values: Sequence[Interval], sign: int) -> int | None:
    """Where the best finite value is; None when there is none."""
    finite = [index for index, interval in enumerate(values) if math.isfinite(interval.value)]
    return max(finite, key=lambda index: sign * values[index].value) if finite else None


def overlap(one: Interval, other: Interval) -> bool:
    """Whether two intervals share a point; false when either is unknown."""
    return one.low <= other.high and other.low <= one.high


def _columns(bins: int, main: bool) -> list[Column]:
    found = []
    for key in MAIN if main else [key for key in TITLES if key not in MAIN]:
        sign = (key in HIGHER_IS_BETTER) - (key in LOWER_IS_BETTER)
        form = "percent" if key in ("accuracy", "error_at_80") else "number"
        found.append(Column(key, TITLES[key].format(bins=bins), form, sign))
    return [*found, *COSTS] if main else found


def _interval(column: Column, cost: Mapping[str, float], summary: Summary) -> Interval:
    if column.cost:
        value = float(cost.get(column.key, math.nan))
        return Interval(value, math.nan, math.nan)
    return summary.get(column.key, Interval(math.nan, math.nan, math.nan))


def _cells(column: Column, values: list[Interval]) -> list[Cell]:
    form, winner = FORMATS[column.form], best(values, column.sign) if column.sign else None
    ends = [end for value in values for end in (value.low, value.value, value.high) if math.isfinite(end)]
    lowest, width = min(ends, default=0.0), max(ends, default=0.0) - min(ends, default=0.0)
    cells = []
    for value in values:
        known = math.isfinite(value.low) and math.isfinite(value.high) and math.isfinite(value.value)
        mark = ""
        if winner is not None and len(values) > 1:
            if form(value.value) == form(values[winner].value):
                mark = "best"
            elif overlap(value, values[winner]):
                mark = "overlaps"
        span = None
        if known and width:
            low, middle, high = (100 * (end - lowest) / width for end in (value.low, value.value, value.high))
            span = low, middle, high
        shown = "–" if math.isnan(value.value) else form(value.value)
        cells.append(Cell(shown, f"{form(value.low)} – {form(value.high)}" if known else "", mark, span))
    return cells
