"""Progress bars and tables on the terminal; standard output is kept for results that a program reads."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

console = Console(stderr=True, highlight=False)
ROWS = (
    ("accuracy", "accuracy"),
    ("nll", "NLL, nats"),
    ("ece", "ECE, {bins} bins"),
    ("brier", "Brier, 0 to 2"),
    ("error_at_80", "error at 80%"),
    ("error_auroc", "error AUROC"),
    ("ood_auroc", "OOD AUROC"),
)
LANGUAGE_ROWS = (
    ("perplexity", "perplexity"),
    ("nll", "NLL, nats/token"),
    ("bits_per_byte", "bits per byte"),
    ("accuracy", "accuracy"),
    ("ece", "ECE, {bins} bins"),
    ("entropy", "entropy, nats"),
    ("mutual_information", "mutual inf."),
    ("ood_perplexity", "OOD perplexity"),
    ("ood_nll", "OOD NLL"),
    ("ood_ece", "OOD ECE"),
    ("ood_auroc", "OOD AUROC"),
)
UNRANKED = {"entropy", "mutual_information", "ood_perplexity", "ood_nll", "ood_ece"}  # no side is the better
LABEL, CELL = 15, 13  # characters of the column of names, and least of an arm's
QUIET_SECONDS = 15.0  # between lines where there is no terminal to draw a bar on


def say(line: str) -> None:
    """A line for a person, wrapped by the terminal if it must be, so that it can be copied whole."""
    console.print(line, markup=False, soft_wrap=True)


def result(value: Mapping[str, Any]) -> None:
    """One JSON object on standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def bar(label: str) -> Iterator[Any]:
    """A progress bar over optimiser steps; yields what :func:`kilobayes.train.fit` calls after each.

    It is drawn from the first step to the last; where there is no terminal, a line is printed now and then.
    """
    if not console.is_terminal:
        yield _lines(label)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=console)
    task = progress.add_task(label, total=None, loss="")

    def watch(at: Any, loss: Any) -> None:
        progress.start()
        progress.update(task, completed=at.step, total=at.steps, loss=f"{float(loss.mean()):.3f}")
        if at.done:
            progress.stop()

    try:
        yield watch
    finally:
        progress.stop()


def _lines(label: str) -> Any:
    said = time.monotonic()

    def watch(at: Any, loss: Any) -> None:
        nonlocal said
        if at.done or time.monotonic() - said > QUIET_SECONDS:
            said = time.monotonic()
            say(f"{label}: step {at.step} of {at.steps}, loss {float(loss.mean()):.3f}")

    return watch


def table(
    names: Sequence[str],
    summaries: Sequence[Mapping[str, Any]],
    costs: Sequence[Mapping[str, float]],
    bins: int = 15,
    rows: Sequence[tuple[str, str]] = ROWS,
) -> Group:
    """A row a metric, a column an arm: the value and under it its 95% interval; the best of a row is marked.

    Arms that do not fit beside each other are continued below; no number is ever cut short.

    Args:
        rows: keys of the metrics and what they are called.
    """
    shown = [(k, label.format(bins=bins)) for k, label in rows if all(k in s for s in summaries)]
    if len(names) == 1:
        return _single(names[0], summaries[0], costs[0], shown)
    best = {key: _best(key, [s[key].value for s in summaries]) for key, _ in shown}
    beside = max(1, (console.width - LABEL) // (CELL + 2))
    beside = -(-len(names) // -(-len(names) // beside))  # as even as the number of blocks allows
    wide = min(30, max(CELL, (console.width - LABEL) // beside - 2))
    parts: list[Any] = []
    for first in range(0, len(names), beside):
        some = range(first, min(first + beside, len(names)))
        part = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        part.add_column("", width=LABEL, no_wrap=True)
        for i in some:
            part.add_column(Text(names[i], overflow="fold"), justify="right", width=wide, overflow="fold")
        for key, label in shown:
            part.add_row(
                label, *(_cell(summaries[i][key], summaries[i][key].value == best[key]) for i in some)
            )
        part.add_row("bytes", *(human(costs[i].get("stored_bytes")) for i in some))
        part.add_row("seconds", *(_seconds(costs[i].get("seconds")) for i in some))
        parts += [part, ""] if some[-1] < len(names) - 1 else [part]
    return Group(
        *parts, Text("95% intervals from resampled rows; the best of a row is marked *", style="dim")
    )


def _single(name: str, summary: Mapping[str, Any], cost: Mapping[str, float], shown: Any) -> Group:
    out = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for column in ("", "value", "95% interval"):
        out.add_column(column, justify="left" if not column else "right")
    for key, label in shown:
        value, _, interval = _cell(summary[key], False).plain.partition("\n")
        out.add_row(label, value, interval)
    out.add_row("bytes", human(cost.get("stored_bytes")))
    out.add_row("seconds", _seconds(cost.get("seconds")))
    return Group(Text(name, style="bold"), out)


def _best(key: str, values: Sequence[float]) -> float:
    from kilobayes.metrics import HIGHER_IS_BETTER

    known = [v for v in values if not math.isnan(v)]
    if len(values) < 2 or not known or key in UNRANKED:
        return math.nan
    return max(known) if key in HIGHER_IS_BETTER else min(known)


def _cell(found: Any, best: bool) -> Text:
    if math.isnan(found.value):
        return Text("undefined", style="dim")
    value = Text(f"{'*' if best else ''}{found.value:.3f}", style="bold" if best else "")
    interval = Text(f"\n{found.low:.3f}–{found.high:.3f}", style="dim")
    return value + interval


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
