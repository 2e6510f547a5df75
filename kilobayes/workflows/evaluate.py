"""Predictions, metrics and the report of a run, and of several runs side by side."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from kilobayes import __version__, spec
from kilobayes.errors import KilobayesError
from kilobayes.files import write_json, write_lines
from kilobayes.metrics import Evaluation, Interval, summarise, to_json
from kilobayes.predict import Predictive
from kilobayes.tasks.data import Examples
from kilobayes.workflows.finetune import Fitted

BINS = 15


def evaluate(
    fitted: Fitted,
    examples: Examples,
    ood: Examples | None = None,
    *,
    name: str = "",
    samples: int | None = None,
) -> tuple[Evaluation, Predictive]:
    """A run on labelled rows, and the entropy of its predictions on rows of another kind.

    Raises:
        KilobayesError: the rows have no labels.
    """
    if examples.labels is None:
        raise KilobayesError(
            "there are no labels to evaluate against", remedy="name one, as in --label-column label"
        )
    if not len(examples):
        raise KilobayesError("there are no rows to evaluate on")
    predictive = fitted.predict(examples, samples)
    other = fitted.predict(ood, samples) if ood is not None and len(ood) else None
    evaluation = Evaluation(
        name=name or arm_name(fitted),
        classes=list(fitted.card.classes),
        labels=np.asarray(examples.labels),
        probs=predictive.probs.numpy(),
        mutual_information=predictive.mutual_info.numpy(),
        texts=[examples.shown(i) for i in range(len(examples))],
        ood_probs=None if other is None else other.probs.numpy(),
        ood_mutual_information=None if other is None else other.mutual_info.numpy(),
        ood_texts=None if other is None or ood is None else [ood.shown(i) for i in range(len(ood))],
        cost=fitted.cost,
        spec={
            "model": fitted.card.base,
            "adapter": spec.format(spec.adapter(fitted.card.adapter)),
            "posterior": spec.format(spec.posterior(fitted.card.posterior)),
            "samples": str(predictive.logits.shape[0]),
            "seed": str(fitted.card.seed),
        },
    )
    return evaluation, predictive


def arm_name(fitted: Fitted) -> str:
    """Such as ``LoRA + Temperature(SWAG())``."""
    adapter = type(spec.adapter(fitted.card.adapter)).__name__
    return f"{adapter} + {spec.format(spec.posterior(fitted.card.posterior))}"


def prediction_rows(
    classes: Sequence[str], predictive: Predictive, examples: Examples
) -> Iterator[dict[str, Any]]:
    """One record a row, in order: label, probabilities, confidence, entropy and mutual information (nats)."""
    probs, entropy, information = predictive.probs, predictive.entropy, predictive.mutual_info
    for i in range(len(examples)):
        best = int(probs[i].argmax())
        row: dict[str, Any] = {"text": examples.texts[i]}
        if examples.pairs is not None:
            row["pair"] = examples.pairs[i]
        row |= {
            "label": classes[best],
            "confidence": round(float(probs[i, best]), 6),
            "probs": {c: round(float(p), 6) for c, p in zip(classes, probs[i])},
            "entropy": round(float(entropy[i]), 6),
            "mutual_information": round(float(information[i]), 6),
        }
        if examples.options is not None:
            row["answer"] = examples.options[i][best]
        if examples.labels is not None:
            row["expected"] = examples.classes[examples.labels[i]]
        yield row


def headline(evaluation: Evaluation, summary: dict[str, Interval]) -> dict[str, Any]:
    """The figures that ``--json`` prints: each metric, rows, bytes and seconds."""
    values = {k: None if np.isnan(v.value) else round(float(v.value), 6) for k, v in summary.items()}
    limits = {
        k: [None if np.isnan(e) else round(float(e), 6) for e in (v.low, v.high)] for k, v in summary.items()
    }
    return {
        "name": evaluation.name,
        **values,
        "n": len(evaluation.labels),
        "bins": BINS,
        "bytes": int(evaluation.cost.get("stored_bytes", 0)),
        "seconds": round(evaluation.cost.get("seconds", 0.0), 3),  # of training
        "peak_bytes": int(evaluation.cost.get("peak_bytes", 0)),
        "intervals_95": limits,
        **evaluation.spec,
    }


def write_outputs(
    folder: Path,
    evaluations: list[Evaluation],
    meta: dict[str, Any],
    predictions: Iterator[dict[str, Any]] | None = None,
) -> list[dict[str, Interval]]:
    """``metrics.json``, ``report.html`` and, for one run, ``predictions.jsonl``; returns the summaries."""
    from kilobayes.report import write_report

    summaries = [summarise(e, bins=BINS) for e in evaluations]
    write_json(folder / "metrics.json", to_json(evaluations, summaries, meta, bins=BINS))
    write_report(folder / "report.html", evaluations, summaries, meta)
    if predictions is not None:
        write_lines(folder / "predictions.jsonl", predictions)
    return summaries


def versions() -> dict[str, str]:
    """Versions of what results depend on."""
    out = {"kilobayes": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "peft", "numpy", "scikit-learn"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            out[package] = "not installed"
    return out


def command() -> str:
    """The command line as a person would type it."""
    program = Path(sys.argv[0]).name
    program = "kilobayes" if program in ("__main__.py", "kilobayes", "cli.py") else program
    return shlex.join([program, *sys.argv[1:]])


def metadata(title: str, data: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """What a report says of where it comes from."""
    return {
        "title": title,
        "command": command(),
        "versions": versions(),
        "created": date.today().isoformat(),
        "data": data,
        "notes": notes,
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
    }
