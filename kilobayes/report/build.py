"""The report: one HTML file that opens offline, needs no script and asks the network for nothing."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kilobayes.errors import KilobayesError
from kilobayes.files import write_text_atomically
from kilobayes.metrics.calibration import BINS, Reliability, reliability
from kilobayes.metrics.evaluation import Evaluation, Interval
from kilobayes.report import drawing, plots
from kilobayes.report.definitions import definitions
from kilobayes.report.examples import choose
from kilobayes.report.headline import findings, headline
from kilobayes.report.words import FORMATS, best, number, percent, probability, table

# Characters that no text needs and that cannot be written, or not be seen: controls and unpaired surrogates.
_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_COSTS = {
    "seconds": "time",
    "peak_bytes": "peak memory",
    "trained_bytes": "trained",
    "stored_bytes": "stored",
}


def build_page(
    evaluations: Sequence[Evaluation], summaries: Sequence[Mapping[str, Interval]], meta: Mapping[str, Any]
) -> str:
    """The report as one HTML document.

    All text is escaped and stripped of control characters; nothing of it is ever read as a template.

    Args:
        evaluations: the arms, at least one, in the order to show them.
        summaries: of each arm its metrics, as ``summarise`` gives them; columns that no arm has are left out.
        meta: facts about the run, each optional: ``title``, ``command`` (the exact command line),
            ``versions`` (a mapping), ``created`` (ISO date), ``data`` (a mapping: source, counts, hash),
            ``notes`` (a list), ``bins`` (as given to ``summarise``; 15 unless told), ``resamples`` (so too).

    Raises:
        KilobayesError: no arm, or not one summary for each arm.
    """
    check_arms(evaluations, summaries)
    bins = int(meta.get("bins", BINS))
    arms = [_arm(index, *pair, bins) for index, pair in enumerate(zip(evaluations, summaries, strict=True))]
    lead = best([summary.get("nll", Interval(math.nan, math.nan, math.nan)) for summary in summaries], -1)
    shown = (
        {key for summary in summaries for key in summary},
        {key for one in evaluations for key in one.cost},
    )
    return template("page.html").render(
        **told(meta, "Calibration report"),
        headline=headline(evaluations, summaries),
        findings=findings(evaluations, summaries),
        table=table(evaluations, summaries, bins),
        more=table(evaluations, summaries, bins, main=False),
        arms=arms,
        lead=lead or 0,
        rows=f"{len(evaluations[0].labels):,} test rows",
        risk_coverage=Markup(plots.risk_coverage_curves(list(evaluations))),
        first_rows=plots.FIRST_ROWS,
        few_rows=drawing.FEW_ROWS,
        figures=max(len(arm["figures"]) for arm in arms),
        bins=bins,
        definitions=definitions(*shown, bins, meta.get("resamples")),
    )


def check_arms(evaluations: Sequence[Any], summaries: Sequence[Any]) -> None:
    """Raises KilobayesError: no arm, or not one summary for each arm."""
    if not evaluations or len(evaluations) != len(summaries):
        found = f"{len(evaluations)} evaluations and {len(summaries)} summaries"
        raise KilobayesError(
            "a report needs arms and one summary for each", found, "give two lists of one length"
        )


def write_report(
    path: str | os.PathLike[str],
    evaluations: Sequence[Evaluation],
    summaries: Sequence[Mapping[str, Interval]],
    meta: Mapping[str, Any],
) -> Path:
    """Write ``build_page`` to ``path``, whole or not at all, making its folder; returns the path."""
    page = build_page(evaluations, summaries, meta)
    target = Path(path)
    write_text_atomically(target, page)
    return target


def _arm(index: int, evaluation: Evaluation, summary: Mapping[str, Interval], bins: int) -> dict[str, Any]:
    """What the template shows of one arm."""
    drawn = {
        "reliability": plots.reliability_diagram(evaluation, index, bins),
        "confidence": plots.confidence_histogram(evaluation, index),
        "entropy": plots.shift_histogram(evaluation, index),
        "mutual_information": plots.shift_histogram(evaluation, index, quantity="mutual information"),
    }
    return {
        "name": evaluation.name,
        "swatch": Markup(drawing.swatch(index)),
        "figures": {name: Markup(svg) for name, svg in drawn.items() if svg},
        "spec": dict(evaluation.spec),
        "cost": costs(evaluation.cost),
        "summary": {key: number(value.value) for key, value in summary.items()},
        "bins": filled_bins(reliability(evaluation.probs, evaluation.labels, bins)),
        "examples": choose(evaluation),
    }


def told(meta: Mapping[str, Any], title: str) -> dict[str, Any]:
    """What a page says of where it comes from; ``title`` where there is none."""
    return {
        "title": meta.get("title") or title,
        "created": meta.get("created", ""),
        "command": meta.get("command", ""),
        "versions": meta.get("versions") or {},
        "data": meta.get("data") or {},
        "notes": meta.get("notes") or [],
    }


def costs(found: Mapping[str, float]) -> dict[str, str]:
    """Costs in words."""
    return {
        _COSTS.get(key, key.replace("_", " ")): FORMATS[_form(key)](float(value))
        for key, value in found.items()
    }


def filled_bins(found: Reliability) -> list[dict[str, float]]:
    """The bins that hold a row, for the table behind the reliability diagram."""
    columns = {
        "low": found.edges[:-1],
        "high": found.edges[1:],
        "count": found.count.astype(int),
        "confidence": found.confidence,
        "accuracy": found.accuracy,
    }
    return [
        {name: values[i].item() for name, values in columns.items()}
        for i in range(len(found.count))
        if found.count[i]
    ]


def _form(cost: str) -> str:
    return "duration" if cost.endswith("seconds") else "size" if cost.endswith("bytes") else "number"


def template(name: str) -> Any:
    """A page's template; all that it is filled with is escaped and stripped of control characters."""
    environment = Environment(
        loader=PackageLoader("kilobayes.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: (
            _UNSEEN.sub("\N{REPLACEMENT CHARACTER}", value) if type(value) is str else value
        ),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "probability": probability}
    return environment.get_template(name)
