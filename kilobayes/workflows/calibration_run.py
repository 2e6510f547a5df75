"""A calibrated adapter as a run: files like any other's, and what calibration changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from kilobayes.errors import KilobayesError
from kilobayes.files import write_text_atomically
from kilobayes.metrics import Evaluation, Interval
from kilobayes.options import Options
from kilobayes.workflows import conformal
from kilobayes.workflows import evaluate as evaluation
from kilobayes.workflows.calibrate import Calibrated
from kilobayes.workflows.calibration_rows import Sources
from kilobayes.workflows.frame import begin, save
from kilobayes.workflows.run import cut

Arms = tuple[list[Evaluation], list[dict[str, Interval]]]


def check_free(folder: Path) -> None:
    """Raises:
    KilobayesError: the folder holds a run, an adapter, or is a file.
    """
    held = next((n for n in ("posterior.json", "adapter_config.json") if (folder / n).exists()), None)
    if held or (folder.exists() and not folder.is_dir()):
        raise KilobayesError(
            f"{folder} holds something already", held or "it is a file", "name another folder with --out"
        )


def write(done: Calibrated, folder: Path, adapter: Path, sources: Sources) -> Arms:
    """Write the run; with test rows also the report, of the adapter before and after, which is returned."""
    fitted = done.fitted
    cost = write_model(folder, fitted, sources)
    conformal.write(folder, fitted.calibration)
    arms: Arms = ([], [])
    if done.rows.test is not None:
        arms = _report(done, folder, adapter, cost)
    write_text_atomically(folder / "README.md", _readme(done, adapter, shown(sources), arms))
    return arms


def write_model(folder: Path, fitted: Any, sources: Sources) -> dict[str, float]:
    """The settings, the model's files and its costs, which are returned; of any task."""
    card = fitted.card
    named = {k: v for k, v in sources.columns.items() if v is not None}
    settings: dict[str, Any] = {
        "max_length": card.max_length,
        "dtype": card.dtype,
        "seed": card.seed,
        **card.settings,
        **named,
    }
    begin(
        folder,
        Options(
            data=shown(sources), model=card.base, out=str(folder), adapter=card.adapter,
            posterior=card.posterior, samples=card.samples, **settings,
        ),
    )  # fmt: skip
    return dict(save(folder, fitted)[0].cost)


def shown(sources: Sources) -> str:
    """What the data are called."""
    return sources.data if isinstance(sources.data, str) else "in memory"


def _report(done: Calibrated, folder: Path, adapter: Path, cost: dict[str, float]) -> Arms:
    fitted, rows = replace(done.fitted, cost=cost), done.rows
    test = rows.test
    assert test is not None
    notes = [*done.notes, *cut(fitted.encode(test).truncated, len(test), fitted, "evaluated")]
    before, _ = evaluation.evaluate(done.before, test, name=f"before: {evaluation.arm_name(done.before)}")
    after, predictive = evaluation.evaluate(fitted, test)
    data = {
        "adapter": str(adapter),
        "classes": ", ".join(fitted.card.classes),
        "calibration rows": len(rows.calibration),
        "training rows": "not given" if rows.train is None else len(rows.train),
        "rows evaluated": len(test),
    }
    meta = evaluation.metadata(f"{adapter.name}, calibrated", data, notes)
    records = evaluation.prediction_rows(fitted.card.classes, predictive, test)
    return [before, after], evaluation.write_outputs(folder, [before, after], meta, records)


def _readme(done: Calibrated, adapter: Path, source: str, arms: Arms) -> str:
    card = done.fitted.card
    lines = ["", "| metric | before | after |", "|---|---|---|"] if arms[1] else []
    for key, label in (("accuracy", "accuracy"), ("nll", "NLL, nats"), ("ece", "ECE"), ("brier", "Brier")):
        if arms[1]:
            before, after = (summary[key].value for summary in arms[1])
            lines.append(f"| {label} | {before:.4f} | {after:.4f} |")
    table = "\n".join(lines)
    return f"""# {adapter.name}, calibrated

`{card.posterior}`, fitted by kilobayes {card.version} on {len(done.rows.calibration)} rows of {source} to
the adapter in {adapter}, on {card.base}. No weight was trained. Classes: {", ".join(card.classes)}.
{table}

```python
import kilobayes as kb

out = kb.load("path/to/this/folder").predictive(["a text"])  # .labels .probs .confidence
```
"""
