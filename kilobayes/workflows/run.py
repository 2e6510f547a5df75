"""One training run from settings to a folder with report."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kilobayes import spec, store
from kilobayes.errors import KilobayesError
from kilobayes.files import write_json, write_lines, write_text_atomically
from kilobayes.metrics import Evaluation, Interval
from kilobayes.options import Options, write_yaml
from kilobayes.workflows import evaluate as evaluation
from kilobayes.workflows.data import Splits, load_splits
from kilobayes.workflows.finetune import Fitted, Watch, fit_examples


@dataclass(frozen=True, eq=False)
class Finished:
    """A run that is on disk."""

    folder: Path
    fitted: Fitted
    splits: Splits
    evaluation: Evaluation
    summary: dict[str, Interval]
    sizes: dict[str, int]


def default_folder(options: Options) -> Path:
    """``runs/DATA-POSTERIOR-SEED``, of letters, digits and dashes."""
    data = Path(options.data).name.split(".")[0] or "data"
    words = re.sub(r"[^A-Za-z0-9]+", "-", f"{data}-{options.posterior}-{options.seed}").strip("-").lower()
    return Path("runs") / words


def check_folder(folder: Path, resume: bool) -> None:
    """Raises:
    KilobayesError: the folder holds something already that this run would overwrite.
    """
    if folder.exists() and not folder.is_dir():
        raise KilobayesError(f"{folder} is a file", remedy="name a folder with --out")
    if resume or not folder.exists():
        return
    if (folder / "posterior.json").exists() or (folder / "checkpoints").exists():
        raise KilobayesError(
            f"{folder} holds a run already",
            "finished" if (folder / "posterior.json").exists() else "unfinished",
            "go on with --resume, or name another folder with --out",
        )


def train(options: Options, *, source: Any = None, watch: Watch | None = None, say: Callable[[str], None] = str) -> Finished:
    """Train, calibrate, save, evaluate and report.

    Args:
        source: data in memory instead of ``options.data``.
        watch: called after each optimiser step.
        say: told of each stage in a line.

    Raises:
        KilobayesError: as everything it calls; a folder that holds another run.
    """
    spec.check(options.adapter, "adapters")
    spec.check(options.posterior, "posteriors")
    folder = Path(options.out) if options.out else default_folder(options)
    check_folder(folder, options.resume)
    splits = load_splits(options, source)
    say(_card(options, splits))
    folder.mkdir(parents=True, exist_ok=True)
    options = replace(options, out=str(folder))
    write_yaml(folder / "run.yaml", options)
    write_json(folder / "env.json", evaluation.versions() | {"command": evaluation.command()})
    log = folder / "log.jsonl"
    records: list[dict[str, Any]] = []

    def logged(progress: Any, loss: Any) -> None:
        records.append({"step": progress.step, "steps": progress.steps, "loss": [round(float(v), 6) for v in loss]})
        if watch is not None:
            watch(progress, loss)

    fitted = fit_examples(
        options,
        splits.train,
        splits.calibration,
        checkpoint=folder / "checkpoints" / "latest.safetensors",
        watch=logged,
    )
    write_lines(log, records)
    sizes = store.save(folder, fitted.model, fitted.posterior, fitted.state, fitted.card)
    stored = float(sizes["checkpoint"] + sizes["posterior"])
    fitted = replace(fitted, cost=fitted.cost | {"stored_bytes": stored})
    write_json(folder / "cost.json", {k: round(v, 3) for k, v in fitted.cost.items()} | {"sizes": sizes})
    for line in warnings_of(fitted, splits):
        say(line)
    test = splits.test or splits.calibration
    found, predictive = evaluation.evaluate(fitted, test, splits.ood)
    meta = evaluation.metadata(
        f"{Path(options.data).name or 'data'}: {found.name}", facts(options, splits), splits.notes + warnings_of(fitted, splits)
    )
    rows = evaluation.prediction_rows(fitted.card.classes, predictive, test)
    (summary,) = evaluation.write_outputs(folder, [found], meta, rows)
    write_text_atomically(folder / "README.md", model_card(fitted, found, summary, splits, sizes))
    return Finished(folder, fitted, splits, found, summary, sizes)


def warnings_of(fitted: Fitted, splits: Splits) -> list[str]:
    """What a person should know about how training went."""
    out = []
    if fitted.truncated:
        share = fitted.truncated / len(splits.train)
        out.append(
            f"{fitted.truncated} training rows ({share:.0%}) were cut at {fitted.card.max_length} tokens; "
            "--max-length sets it."
        )
    if fitted.trained is not None and fitted.trained.diverged:
        out.append(f"Members {fitted.trained.diverged} diverged and were frozen where they did; try a lower --lr.")
    if fitted.trained is not None and fitted.trained.stopped:
        out.append("Training stopped at --max-minutes, before its schedule ended.")
    return out


def facts(options: Options, splits: Splits) -> dict[str, Any]:
    """Counts of the data, for the report."""
    out = {
        "source": options.data or "in memory",
        "classes": ", ".join(splits.train.classes),
        "training rows": len(splits.train),
        "calibration rows": len(splits.calibration),
        f"rows evaluated ({splits.test_name})": len(splits.test or splits.calibration),
    }
    if splits.ood is not None:
        out["out-of-distribution rows"] = f"{len(splits.ood)} of {options.ood}"
    return out


def _card(options: Options, splits: Splits) -> str:
    return (
        f"{options.model} · {options.adapter} · {options.posterior} · {len(splits.train)} training, "
        f"{len(splits.calibration)} calibration and {len(splits.test or [])} test rows, {len(splits.train.classes)} classes"
    )


def stored_cost(folder: Path) -> dict[str, float]:
    """The cost that a run recorded, for its later evaluations; empty if it recorded none."""
    try:
        found = json.loads((folder / "cost.json").read_text(encoding="utf-8"))
        return {k: float(v) for k, v in found.items() if isinstance(v, int | float)}
    except (OSError, ValueError):
        return {}


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
    return f"""---
base_model: {card.base}
library_name: peft
tags: [kilobayes, calibration, bayesian]
---

# {found.name} on {card.base}

Classes: {", ".join(card.classes)}. The folder holds the posterior's mean as a PEFT checkpoint and the posterior beside it.

```python
import kilobayes as kb

clf = kb.load("path/to/this/folder")
out = clf.predictive(["a text"])  # .labels .probs .entropy .epistemic
```

The mean alone loads in PEFT: `import kilobayes; PeftModel.from_pretrained(base, "this folder")`. The mean of the
weights is not the mean of the predictions: the calibration below is that of the averaged predictions.

## Calibration

On {len(found.labels)} rows ({splits.test_name}), with 95% bootstrap intervals:

| metric | value | interval |
|---|---|---|
{rows}

## Size

Adapter {sizes["adapter"]:,} bytes, head {sizes["head"]:,} bytes, posterior file {sizes["posterior"]:,} bytes.

Adapter `{card.adapter}`, posterior `{card.posterior}`, kilobayes {card.version}.
"""
