"""Progress bars and tables on the terminal; standard output is kept for results that a program reads."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

console = Console(stderr=True, highlight=False)
COLUMNS = (
    ("accuracy", "accuracy"),
    ("nll", "NLL, nats"),
    ("ece", "ECE"),
    ("brier", "Brier"),
    ("error_at_80", "error at 80%"),
    ("error_auroc", "error AUROC"),
    ("ood_auroc", "OOD AUROC"),
)


def say(line: str) -> None:
    console.print(line, markup=False)


def result(value: Mapping[str, Any]) -> None:
    """One JSON object on standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def bar(label: str) -> Iterator[Any]:
    """A progress bar over optimiser steps; yields what :func:`kilobayes.train.fit` calls after each."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=not console.is_terminal) as progress:
        task = progress.add_task(label, total=None, loss=float("nan"))

        def watch(at: Any, loss: Any) -> None:
            progress.update(task, completed=at.step, total=at.steps, loss=float(loss.mean()))

        yield watch


def table(names: Sequence[str], summaries: Sequence[Mapping[str, Any]], costs: Sequence[Mapping[str, float]]) -> Table:
    """One row an arm: each figure with its 95% interval; the best of a column is marked."""
    from kilobayes.metrics import HIGHER_IS_BETTER

    shown = [(k, label) for k, label in COLUMNS if all(k in s for s in summaries)]
    out = Table(box=None, pad_edge=False, header_style="bold")
    out.add_column("")
    for _, label in shown:
        out.add_column(label, justify="right")
    out.add_column("bytes", justify="right")
    out.add_column("seconds", justify="right")
    best = {}
    for key, _ in shown:
        values = [s[key].value for s in summaries]
        best[key] = max(values) if key in HIGHER_IS_BETTER else min(values)
    for name, summary, cost in zip(names, summaries, costs, strict=True):
        cells = []
        for key, _ in shown:
            v = summary[key]
            mark = "[bold]" if len(summaries) > 1 and v.value == best[key] else ""
            cells.append(f"{mark}{v.value:.3f}{'[/bold]' if mark else ''} [dim]{v.low:.3f}-{v.high:.3f}[/dim]")
        out.add_row(name, *cells, human(cost.get("stored_bytes")), _seconds(cost.get("seconds")))
    return out


def human(value: float | None) -> str:
    """Bytes as a person says them."""
    if value is None:
        return "-"
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 10 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
