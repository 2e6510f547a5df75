"""One training run from settings to a folder with report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kilobayes import spec
from kilobayes.files import write_text_atomically
from kilobayes.metrics import Evaluation, Interval
from kilobayes.model_files import model_folder
from kilobayes.options import Options
from kilobayes.tasks.data import Examples
from kilobayes.tasks.prompt import CHOICES
from kilobayes.workflows import conformal, frame
from kilobayes.workflows import evaluate as evaluation
from kilobayes.workflows.data import Splits, load_splits
from kilobayes.workflows.finetune import Fitted, fit_examples
from kilobayes.workflows.folder import CHECKPOINT, Log, place
from kilobayes.workflows.learn import Watch, check_calibration


@dataclass(frozen=True, eq=False)
class Finished:
    """A run that is on disk."""

    folder: Path
    fitted: Fitted
    splits: Splits
    evaluation: Evaluation
    summary: dict[str, Interval]
    sizes: dict[str, int]


def train(
    options: Options,
    *,
    source: Any = None,
    watch: Watch | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Finished:
    """Train, calibrate, save, evaluate and report.

    Args:
        source: data in memory instead of ``options.data``.
        watch: called after each optimiser step.
        say: told of each stage in a line.

    Raises:
        KilobayesError: as everything it calls; a folder that holds another run, or this one finished.
    """
    spec.adapter(options.adapter)
    posterior = spec.posterior(options.posterior)
    options = place(options)
    folder = Path(options.out)
    splits = load_splits(options, source)
    model_folder(options.model)
    check_calibration(posterior, options, splits.calibration)
    say(_card(options, splits))
    frame.begin(folder, options)

    def fit(log: Log) -> Fitted:
        return fit_examples(
            options, splits.train, splits.calibration, checkpoint=folder / CHECKPOINT, watch=log
        )

    fitted, told = frame.fitted_in(folder, options, watch, fit)
    fitted, sizes = frame.save(folder, fitted)
    fitted = fitted.calibrated(splits.calibration)
    conformal.write(folder, fitted.calibration)
    rows = fitted.encode(splits.test)
    notes = [
        *splits.notes,
        *told,
        *warnings_of(fitted, splits),
        *cut(rows.truncated, len(rows), fitted, "evaluated"),
    ]
    for line in notes:
        say(f"note: {line}")
    found, predictive = evaluation.evaluate(fitted, splits.test, splits.ood)
    title = f"{Path(options.data).name or 'data'}: {found.name}"
    meta = evaluation.metadata(title, facts(options, splits), notes)
    records = evaluation.prediction_rows(fitted.card.classes, predictive, splits.test)
    (summary,) = evaluation.write_outputs(folder, [found], meta, records)
    # the last file: what is not there yet after a kill, --resume writes again
    write_text_atomically(folder / "README.md", model_card(fitted, found, summary, splits, sizes))
    return Finished(folder, fitted, splits, found, summary, sizes)


def cut(count: int, rows: int, fitted: Fitted, kind: str) -> list[str]:
    """A note that rows lost their end, if any did."""
    if not count:
        return []
    limit = fitted.card.max_length
    return [f"{count} {kind} rows ({count / rows:.0%}) were cut at {limit} tokens; --max-length sets it."]


def warnings_of(fitted: Fitted, splits: Splits) -> list[str]:
    """What a person should know about how training went."""
    return [*cut(fitted.truncated, len(splits.train), fitted, "training"), *frame.went(fitted.trained)]


def facts(options: Options, splits: Splits) -> dict[str, Any]:
    """Counts of the data, for the report."""
    out = {
        "source": options.data or "in memory",
        "classes": ", ".join(splits.train.classes),
        **({} if splits.train.prompt is None else {"template": splits.train.prompt.shown}),
        "training rows": len(splits.train),
        "calibration rows": len(splits.calibration or []),
        f"rows evaluated ({splits.test_name})": len(splits.test),
    }
    if splits.ood is not None:
        out["out-of-distribution rows"] = f"{len(splits.ood)} of {options.ood}"
    return out


def _card(options: Options, splits: Splits) -> str:
    rows = f"{len(splits.train)} training and {len(splits.calibration or [])} calibration rows"
    test = f"{len(splits.test)} of {splits.test_name} to evaluate on" if splits.own_test else "no test rows"
    return (
        f"model {options.model}, adapter {options.adapter}, posterior {options.posterior}\n"
        f"data  {options.data or 'in memory'}: {rows}, {test}, {len(splits.train.classes)} classes\n"
        f"run   {options.out}"
    )


def _example(rows: Examples) -> str:
    """A row as predictions take it."""
    if rows.prompt is None:
        return '"a text"' if rows.pairs is None else '("a text", "another")'
    columns = {name: "..." for name in rows.prompt.fields if name != CHOICES}
    return str(columns if rows.options is None else columns | {CHOICES: ["...", "..."]})


def model_card(
    fitted: Fitted, found: Evaluation, summary: dict[str, Interval], splits: Splits, sizes: dict[str, int]
) -> str:
    """The README of a run: how to load it, and how calibrated it is."""

    def line(key: str, label: str) -> str:
        v = summary[key]
        return f"| {label} | {v.value:.4f} | {v.low:.4f} to {v.high:.4f} |"

    rows = "\n".join(
        line(k, label)
        for k, label in (
            ("accuracy", "accuracy"),
            ("nll", "negative log-likelihood, nats"),
            ("ece", f"expected calibration error, {evaluation.BINS} equal-width bins"),
            ("brier", "Brier score"),
            ("error_at_80", "error at 80% coverage"),
        )
    )
    card = fitted.card
    head = {"base_model": card.base, "library_name": "peft", "tags": ["kilobayes", "calibration", "bayesian"]}
    return f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---

# {found.name} on {card.base}

Classes: {", ".join(card.classes)}. The folder holds the posterior's mean as a PEFT checkpoint and the
posterior beside it.

```python
import kilobayes as kb

clf = kb.load("path/to/this/folder")
out = clf.predictive([{_example(splits.train)}])  # .labels .probs .entropy .epistemic
```

The mean alone loads in PEFT: `import kilobayes; PeftModel.from_pretrained(base, "this folder")`. The mean of
the weights is not the mean of the predictions: the calibration below is that of the averaged predictions.

## Calibration

On {len(found.labels)} rows ({splits.test_name}), with 95% bootstrap intervals:

| metric | value | interval |
|---|---|---|
{rows}

## Size

Adapter {sizes["adapter"]:,} bytes, head {sizes["head"]:,} bytes, posterior file {sizes["posterior"]:,} bytes.

Adapter `{found.spec["adapter"]}`, posterior `{found.spec["posterior"]}`, seed {card.seed}, kilobayes
{card.version}. `kilobayes train --config run.yaml --out OTHER` repeats the run.
"""
