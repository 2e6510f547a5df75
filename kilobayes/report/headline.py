"""What was found, in words computed from the numbers: who leads, by how much, and whether that is settled."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kilobayes.errors import KilobayesError
from kilobayes.metrics.calibration import top
from kilobayes.metrics.evaluation import Evaluation, Interval
from kilobayes.metrics.intervals import paired_difference
from kilobayes.report.words import Summary, best, number, overlap, percent

_UNKNOWN = Interval(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Loss:
    """What arms are ranked by, lower being better: a key of summaries; its name, also with an article."""

    key: str = "nll"
    name: str = "NLL"
    one: str = "an NLL"
    unit: str = " nats"


NLL = Loss()


def headline(evaluations: Sequence[Evaluation], summaries: Sequence[Summary]) -> str:
    """One sentence: the arm with the lowest NLL, and whose intervals overlap its own."""
    rows = f"{len(evaluations[0].labels):,} test rows"
    return lowest([one.name for one in evaluations], summaries, rows)


def lowest(names: Sequence[str], summaries: Sequence[Summary], rows: str, loss: Loss = NLL) -> str:
    """One sentence: the arm with the lowest loss, and whose intervals overlap its own.

    Args:
        rows: what was evaluated on.
    """
    nll = known(summaries, loss.key)
    first = best(nll, -1)
    if first is None:
        return f"No arm has a finite {loss.name}, so none is put first."
    name, stated = _listed([names[first]]), _stated(nll[first], number, loss.unit)
    if len(nll) == 1:
        return f"{name} has {loss.one} of {stated} on {rows}."
    start = f"Of {len(nll)} arms, {name} has the lowest {loss.name}: {stated}"
    others = [index for index in range(len(nll)) if index != first]
    close = [names[index] for index in others if overlap(nll[index], nll[first])]
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
    names = [one.name for one in evaluations]

    def difference(first: int, second: int) -> Interval:
        return paired_difference("nll", evaluations[first], evaluations[second])

    first = best(known(summaries, "nll"), -1)
    found = [("Row by row", runner_up(names, summaries, difference))]
    found.append(("Accuracy", highest(names, known(summaries, "accuracy"), percent)))
    if first is not None:
        confidence, correct = top(evaluations[first].probs, evaluations[first].labels)
        means = float(confidence.mean()), float(correct.mean())
        found.append(("Calibration", calibration(names[first], *means, summaries[first])))
    found.append(("Out of distribution", shift(names, known(summaries, "ood_auroc"))))
    return [(topic, words) for topic, words in found if words]


def _listed(names: Sequence[str]) -> str:
    """a; a and b; a, b and c; names that could be mistaken for such a list are quoted."""
    shown = [f"“{name}”" if "," in name or " and " in name else name for name in names]
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


def runner_up(
    names: Sequence[str],
    summaries: Sequence[Summary],
    difference: Callable[[int, int], Interval],
    rows: str = "rows",
    loss: Loss = NLL,
) -> str:
    """By how much the best arm leads the second, when both are resampled alike.

    Args:
        difference: the loss of the second arm less that of the first; refuses with KilobayesError.
    """
    values = known(summaries, loss.key)
    first = best(values, -1)
    second = best([_UNKNOWN if index == first else value for index, value in enumerate(values)], -1)
    if first is None or second is None:
        return ""
    try:
        lead = difference(first, second)
    except KilobayesError:
        return ""  # tested on different rows: there is nothing to pair
    one, other = _listed([names[first]]), _listed([names[second]])
    verdict = "support the lead" if lead.low > 0 else "do not settle which is better"
    return (
        f"{one} is {_stated(lead, number, loss.unit)} below the runner-up, {other}, when both are "
        f"resampled on the same {rows}. The {rows} {verdict}."
    )


def highest(names: Sequence[str], values: Sequence[Interval], form: Callable[[float], str]) -> str:
    """Whose value is the highest, and how many intervals overlap its own; empty where there is none."""
    leader = best(values, 1)
    if leader is None:
        return ""
    peak = values[leader]
    if len(values) == 1:
        return f"{_stated(peak, form)}."
    leaders = [name for name, value in zip(names, values, strict=True) if value.value == peak.value]
    others = [value for value in values if value.value < peak.value]
    start = (
        f"{'Highest' if len(leaders) == 1 else 'Shared highest'}: {_listed(leaders)} with "
        f"{_stated(peak, form)}"
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


def calibration(name: str, confidence: float, right: float, summary: Summary, rows: str = "rows") -> str:
    """Whether an arm is as sure as it is right, on average."""
    gap = confidence - right
    accuracy = summary.get("accuracy", _UNKNOWN)
    direction = "about as sure as it is right"
    if abs(gap) >= 0.0005:
        direction = f"{abs(100 * gap):.1f} points too {'sure' if gap > 0 else 'unsure'} on average"
    words = (
        f"{_listed([name])} is {percent(confidence)} sure on average and right on {percent(right)} of the "
        f"{rows}: {direction}"
    )
    if accuracy.low <= confidence <= accuracy.high:
        return f"{words}, which is within the interval of its accuracy."
    return f"{words}."


def shift(names: Sequence[str], values: Sequence[Interval]) -> str:
    """Whose entropy tells rows of another kind best."""
    words = highest(names, values, number)
    if not words:
        return ""
    peak = values[best(values, 1) or 0]
    chance = " That is no better than chance." if peak.low <= 0.5 else ""
    return f"AUROC of entropy (chance is 0.5). {words}{chance}"


def known(summaries: Sequence[Summary], key: str) -> list[Interval]:
    """A metric of every arm; nan where one has none."""
    return [summary.get(key, _UNKNOWN) for summary in summaries]


def _stated(interval: Interval, form: Callable[[float], str], unit: str = "") -> str:
    if not math.isfinite(interval.low + interval.high):
        return f"{form(interval.value)}{unit}"
    return f"{form(interval.value)}{unit} (95% interval {form(interval.low)} to {form(interval.high)})"
