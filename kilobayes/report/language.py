"""The report of language models: one HTML file like that of classifiers, with texts token by token."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from kilobayes.files import write_text_atomically
from kilobayes.metrics.intervals import Interval
from kilobayes.metrics.language import BINS, comparable, paired_difference, reliability
from kilobayes.metrics.texts import (
    DEFINITIONS,
    HIGHER_IS_BETTER,
    LOWER_IS_BETTER,
    Excerpt,
    TextEvaluation,
    differences,
)
from kilobayes.report import drawing
from kilobayes.report.build import check_arms, costs, filled_bins, template, told
from kilobayes.report.definitions import COSTS as COST_MEANINGS
from kilobayes.report.headline import NLL, Loss, calibration, known, lowest, runner_up, shift
from kilobayes.report.language_plots import reliability_diagram, shift_histogram
from kilobayes.report.words import COSTS, Column, Summary, best, filled, number

TITLES = {
    "perplexity": "Perplexity",
    "nll": "NLL (nats per token)",
    "bits_per_byte": "Bits per byte",
    "accuracy": "Token accuracy",
    "ece": f"ECE ({BINS} bins)",
    "entropy": "Entropy (nats)",
    "mutual_information": "Mutual information (nats)",
    "confidence": "Confidence",
    "ood_auroc": "OOD AUROC",
    "ood_auroc_mi": "OOD AUROC by mutual information",
}
MAIN = ("perplexity", "nll", "bits_per_byte", "accuracy", "ece", "ood_auroc")
OUTSIDE = ("perplexity", "nll", "bits_per_byte", "accuracy", "ece", "entropy", "mutual_information")
PER_TOKEN = replace(NLL, unit=" nats per token")
PER_BYTE = Loss("bits_per_byte", "loss per byte", "a loss", " bits per byte")
_SHARES = ("accuracy", "confidence")


def build_page(
    evaluations: Sequence[TextEvaluation], summaries: Sequence[Summary], meta: Mapping[str, Any]
) -> str:
    """The report as one HTML document; as :func:`kilobayes.report.build_page`, of language models.

    Raises:
        KilobayesError: no arm, or not one summary for each arm.
    """
    check_arms(evaluations, summaries)
    paid = [one.cost for one in evaluations]
    scale = _scale([excerpt for one in evaluations for excerpt in one.excerpts])
    arms = [_arm(index, one, scale) for index, one in enumerate(evaluations)]
    shown = {key for summary in summaries for key in summary}
    scores = evaluations[0].scores
    return template("language.html").render(
        **told(meta, "Language model report"),
        headline=headline(evaluations, summaries),
        findings=findings(evaluations, summaries),
        table=filled([*_columns(MAIN), *COSTS], paid, summaries),
        more=filled(
            _columns([k for k in TITLES if k not in MAIN]) + _columns(OUTSIDE, "ood_"), paid, summaries
        ),
        paired=_paired(evaluations),
        arms=arms,
        rows=f"{len(scores.bytes):,} test documents of {len(scores.nll):,} tokens",
        few_rows=drawing.FEW_ROWS,
        figures=max(len(arm["figures"]) for arm in arms),
        bins=BINS,
        scale=scale,
        definitions=_definitions(shown, {key for cost in paid for key in cost}),
    )


def write_report(
    path: str | os.PathLike[str],
    evaluations: Sequence[TextEvaluation],
    summaries: Sequence[Summary],
    meta: Mapping[str, Any],
) -> Path:
    """Write :func:`build_page` to ``path``, whole or not at all, making its folder; returns the path."""
    page = build_page(evaluations, summaries, meta)
    write_text_atomically(Path(path), page)
    return Path(path)


def headline(evaluations: Sequence[TextEvaluation], summaries: Sequence[Summary]) -> str:
    """One sentence: the arm with the lowest loss, per byte where the arms cut texts into other tokens."""
    scores = evaluations[0].scores
    rows = f"{len(scores.bytes):,} test documents of {len(scores.nll):,} tokens"
    return lowest([one.name for one in evaluations], summaries, rows, _loss(evaluations))


def findings(evaluations: Sequence[TextEvaluation], summaries: Sequence[Summary]) -> list[tuple[str, str]]:
    """What else there is to say, as (topic, words): paired comparison, calibration, shift."""
    names, loss = [one.name for one in evaluations], _loss(evaluations)

    def difference(first: int, second: int) -> Interval:
        return paired_difference(loss.key, evaluations[first].scores, evaluations[second].scores)

    found = [("Text by text", runner_up(names, summaries, difference, "documents", loss))]
    first = best(known(summaries, loss.key), -1)
    if first is not None:
        sure, right = (summaries[first][key].value for key in ("confidence", "accuracy"))
        found.append(("Calibration", calibration(names[first], sure, right, summaries[first], "tokens")))
    found.append(("Out of distribution", shift(names, known(summaries, "ood_auroc"))))
    return [(topic, words) for topic, words in found if words]


def _loss(evaluations: Sequence[TextEvaluation]) -> Loss:
    first = evaluations[0].scores
    same = all("nll" in comparable(first, one.scores) for one in evaluations)
    return PER_TOKEN if same else PER_BYTE


def _columns(keys: Sequence[str], prefix: str = "") -> list[Column]:
    return [
        Column(
            prefix + key,
            f"OOD: {TITLES[key]}" if prefix else TITLES[key],
            "percent" if key in _SHARES else "number",
            (key in HIGHER_IS_BETTER) - (key in LOWER_IS_BETTER) if not prefix else 0,
        )
        for key in keys
    ]


def _paired(evaluations: Sequence[TextEvaluation]) -> list[tuple[Column, list[Any]]]:
    """Differences to the first arm, which stands in the table as dashes."""
    if len(evaluations) < 2:
        return []
    columns = [replace(one, sign=0) for one in _columns(OUTSIDE)]
    return filled(columns, [{}] * len(evaluations), [{}, *differences(evaluations)])


def _arm(index: int, one: TextEvaluation, scale: Mapping[str, float]) -> dict[str, Any]:
    table = reliability(one.scores)
    drawn = {
        "reliability": reliability_diagram(table, index),
        "nll": shift_histogram(one, "nll", index),
        "entropy": shift_histogram(one, "entropy", index),
        "mutual_information": shift_histogram(one, "information", index),
    }
    return {
        "name": one.name,
        "swatch": Markup(drawing.swatch(index)),
        "figures": {name: Markup(svg) for name, svg in drawn.items() if svg},
        "spec": dict(one.spec),
        "cost": costs(one.cost),
        "bins": filled_bins(table[0]),
        "excerpts": [_excerpt(excerpt, scale) for excerpt in one.excerpts],
    }


def _scale(excerpts: Sequence[Excerpt]) -> dict[str, float]:
    """The most that a token of any arm has, so that shades compare; empty where no text is shown."""
    if not excerpts:
        return {}
    return {
        name: max(float(np.nanmax(getattr(excerpt, name))) for excerpt in excerpts)
        for name in ("entropy", "information")
    }


def _excerpt(excerpt: Excerpt, scale: Mapping[str, float]) -> dict[str, Any]:
    tokens: list[dict[str, Any]] = []
    columns = (excerpt.pieces, *(c.tolist() for c in (excerpt.nll, excerpt.entropy, excerpt.information)))
    for text, nll, entropy, information in zip(*columns, strict=True):
        if math.isnan(nll):
            tokens.append({"text": text, "share": None})
            continue
        share = 100 * entropy / max(scale["entropy"], 1e-9)
        line = information / scale["information"] if scale["information"] > 0.0005 else 0.0
        said = (
            f"probability {math.exp(-nll):.2g}, entropy {entropy:.2f}, mutual information {information:.3f}"
        )
        tokens.append({"text": text, "share": f"{share:.0f}", "line": f"{line:.2f}", "told": said})
    means = (number(float(np.nanmean(c))) for c in (excerpt.nll, excerpt.entropy, excerpt.information))
    words = "NLL {}, entropy {}, mutual information {} nats per token shown".format(*means)
    return {"outside": excerpt.outside, "tokens": tokens, "words": words}


def _definitions(shown: set[str], paid: set[str]) -> list[tuple[str, str]]:
    found = []
    for key, title in TITLES.items():
        if key in shown:
            text = DEFINITIONS[key].format(bins=BINS)
            found.append((title, f"{text[0].upper()}{text[1:]}."))
    found += [meaning for key, meaning in COST_MEANINGS.items() if key in paid]
    interval = (
        "Percentile bootstrap from 1,000 resamples of the test documents, whose tokens stay together: tokens "
        "of one text are far from independent. It covers the choice of documents, not that of training rows "
        "or seeds."
    )
    return [*found, ("95% interval", interval)]
