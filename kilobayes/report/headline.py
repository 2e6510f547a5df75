"""What was found, in words computed from the numbers: who leads, by how much, and whether that is settled."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from kilobayes.errors import KilobayesError
from kilobayes.metrics.calibration import top
from kilobayes.metrics.evaluation import Evaluation, Interval
from kilobayes.metrics.intervals import paired_difference
from kilobayes.report.words import Summary, best, number, overlap, percent

_UNKNOWN = Interval(math.nan, math.nan, math.nan)


def headline(evaluations: Sequence[Evaluation], summaries: Sequence[Summary]) -> str:
    """One sentence: the arm with the lowest NLL, and whose intervals overlap its own."""
    nll = _values(summaries, "nll")
    first = best(nll, -1)
    if first is None:
        return "No arm has a finite NLL, so none is put first."
    name, stated = _listed([evaluations[first].name]), _stated(nll[first], number, " nats")
    if len(nll) == 1:
        return f"{name} has an NLL of {stated} on {len(evaluations[0].labels):,} test rows."
    start = f"Of {len(nll)} arms, {name} has the lowest NLL: {stated}"
    others = [index for index in range(len(nll)) if index != first]
    close = [evaluations[index].name for index in others if overlap(nll[index], nll[first])]
    if not all(math.isfinite(value.low + value.high) for value in nll):
        return f"{start}."
    if not close:
        return f"{start}; its interval is clear of {'the other' if len(others) == 1 else 'all others'}."
    if len(close) == len(others):
        whose = "the two intervals overlap" if len(others) == 1 else "all other intervals overlap it"
        return f"{start}; {whose}."
    if len(close) == 1:
        return f"{start}; the interval of {_listed(close)} overlaps it."
    return f"{start}; the intervals of {_listed(close)} overlap it."


def findings(evaluations: Sequence[Evaluation], summaries: Sequence[Summary]) -> list[tuple[str, str]]:
    """What else there is to say, as (topic, words): paired comparison, accuracy, calibration, shift."""
    nll = _values(summaries, "nll")
    first = best(nll, -1)
    found = []
    if first is not None:
        found.append(("Row by row", _runner_up(evaluations, nll, first)))
    found.append(("Accuracy", _highest(evaluations, _values(summaries, "accuracy"), percent)))
    if first is not None:
        found.append(("Calibration", _calibration(evaluations[first], summaries[first])))
    found.append(("Out of distribution", _shift(evaluations, _values(summaries, "ood_auroc"))))
    return [(topic, words) for topic, words in found if words]


def _listed(names: Sequence[str]) -> str:
    """a; a and b; a, b and c; names that could be mistaken for such a list are quoted."""
    shown = [f"“{name}”" if "," in name or " and " in name else name for name in names]
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


def _runner_up(evaluations: Sequence[Evaluation], nll: Sequence[Interval], first: int) -> str:
    second = best([_UNKNOWN if index == first else value for index, value in enumerate(nll)], -1)
    if second is None:
        return ""
    try:
        difference = paired_difference("nll", evaluations[first], evaluations[second])
    except KilobayesError:
        return ""  # tested on different rows: there is nothing to pair
    one, other = _listed([evaluations[first].name]), _listed([evaluations[second].name])
    verdict = "support the lead" if difference.low > 0 else "do not settle which is better"
    return (
        f"{one} is {_stated(difference, number, ' nats')} below the runner-up, {other}, when both are "
        f"resampled on the same rows. The rows {verdict}."
    )


def _highest(
    evaluations: Sequence[Evaluation], values: Sequence[Interval], form: Callable[[float], str]
) -> str:
    leader = best(values, 1)
    if leader is None:
        return ""
    peak = values[leader]
    if len(values) == 1:
        return f"{_stated(peak, form)}."
    names = [one.name for one, value in zip(evaluations, values, strict=True) if value.value == peak.value]
    others = [value for value in values if value.value < peak.value]
    start = (
        f"{'Highest' if len(names) == 1 else 'Shared highest'}: {_listed(names)} with {_stated(peak, form)}"
    )
    if not others:
        return f"{start}."
    close = sum(overlap(value, peak) for value in others)
    if len(others) == 1:
        return f"{start}. The other interval {'overlaps' if close else 'does not overlap'} it."
    if close == len(others):
        return f"{start}. {'Both' if close == 2 else 'All'} other intervals overlap it."
    verb = "overlaps" if close < 2 else "overlap"
    return f"{start}. {close or 'None'} of the {len(others)} other intervals {verb} it."


def _calibration(evaluation: Evaluation, summary: Summary) -> str:
    confidence, correct = top(evaluation.probs, evaluation.labels)
    gap = float(confidence.mean() - correct.mean())
    accuracy = summary.get("accuracy", _UNKNOWN)
    direction = "about as sure as it is right"
    if abs(gap) >= 0.0005:
        direction = f"{abs(100 * gap):.1f} points too {'sure' if gap > 0 else 'unsure'} on average"
    words = (
        f"{_listed([evaluation.name])} is {percent(float(confidence.mean()))} sure on average and right on "
        f"{percent(float(correct.mean()))} of the rows: {direction}"
    )
    if accuracy.low <= confidence.mean() <= accuracy.high:
        return f"{words}, which is within the interval of its accuracy."
    return f"{words}."


def _shift(evaluations: Sequence[Evaluation], values: Sequence[Interval]) -> str:
    words = _highest(evaluations, values, number)
    if not words:
        return ""
    peak = values[best(values, 1) or 0]
    chance = " That is no better than chance." if peak.low <= 0.5 else ""
    return f"AUROC of entropy (chance is 0.5). {words}{chance}"


def _values(summaries: Sequence[Summary], key: str) -> list[Interval]:
    return [summary.get(key, _UNKNOWN) for summary in summaries]


def _stated(interval: Interval, form: Callable[[float], str], unit: str = "") -> str:
    if not math.isfinite(interval.low + interval.high):
        return f"{form(interval.value)}{unit}"
    return f"{form(interval.value)}{unit} (95% interval {form(interval.low)} to {form(interval.high)})"
