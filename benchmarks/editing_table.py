"""The table of ``editing.py``: what its cache holds, as Markdown and JSON."""

from __future__ import annotations

import argparse
import shlex
import statistics
from pathlib import Path
from typing import Any

from kilobayes.files import write_json, write_text_atomically

COLUMNS = (
    ("success", "success"), ("generality", "generality"), ("locality", "locality"), ("kept", "kept"),
)  # fmt: skip


def cell(runs: list[dict[str, Any]], key: str, digits: int = 2) -> str:
    """Mean over seeds, and their standard deviation where it is not zero."""
    values = [run[key] for run in runs if run.get(key) is not None]
    if not values:
        return "-"
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    shown = f"{statistics.mean(values):.{digits}f}"
    return shown + (f" ±{spread:.{digits}f}" if round(spread, digits) else "")


def table(held: dict[str, dict[str, Any]], mode: str, count: str = "") -> list[str]:
    """A row for each arm: teacher forcing / free generation.

    Args:
        count: edits of a sequence, after which it was scored.
    """
    head = ["arm", "rate", *(name for _, name in COLUMNS)]
    head += ["right after its edit"] if count else []
    head += ["entries changed", "bytes"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for name, arm in held.items():
        if mode not in arm:
            continue
        runs = arm[mode][count] if count else arm[mode]
        cells = [name, f"{arm[f'rate_{mode}']:g}"]
        names = [key for key, _ in COLUMNS] + (["then"] if count else [])
        cells += [f"{cell(runs, f'{key}_teacher')} / {cell(runs, f'{key}_free')}" for key in names]
        cells += [f"{statistics.mean(r['changed'] for r in runs):.1%}", f"{arm['bytes']:,}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def write(
    a: argparse.Namespace, changed: dict[str, Any], base: dict[str, Any], held: dict[str, dict[str, Any]]
) -> None:
    """``OUT.md``, without what is concluded from it, and ``OUT.json``.

    Args:
        changed: settings that are not at their defaults.
    """
    out = Path(a.out)
    command = "OMP_NUM_THREADS=1 python benchmarks/editing.py DATA/counterfact/test.jsonl"
    for key, value in changed.items():
        if key not in ("data", "cache", "out", "quick"):
            shown = value if isinstance(value, list) else [value]
            command += f" --{key.replace('_', '-')} {shlex.join(map(str, shown))}"
    text = [
        "# Editing facts", "", f"    {command}", "",
        f"The base is a Llama of {base['parameters']:,} parameters, trained on {base['facts']} facts of CounterFact, three sentences each, "
        f"until it answered {base['prompts']:.0%} of the prompts in free generation ({base['rephrased']:.0%} of the rephrased ones, "
        f"{base['locality']:.0%} of those of locality). {a.edits} of these facts are edited to CounterFact's new answers, with at most "
        f"{a.steps} steps each, stopping at a loss below 0.1. Learning rates are chosen on other facts of the base, by the harmonic mean "
        f"of free success and teacher-forced locality. Cells are *teacher forcing / free generation*, means over {a.seeds} seeds ± their "
        f"standard deviation. Texts of this base end after the answer, so fluency says nothing here. The scores are "
        "defined in [Editing facts](../editing.md).", "",
        "## Single edits, each from the unedited model", "", *table(held, "single"), "",
    ]  # fmt: skip
    for count in map(str, a.in_turn) if any("sequential" in arm for arm in held.values()) else ():
        text += [f"## {count} edits in sequence, scored after the last", ""]
        text += [*table(held, "sequential", count), ""]
    page = out.with_suffix(".md")
    mark = "## What it says"
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    said = old[old.index(mark) :] if mark in old else ""  # conclusions are written by a person, and kept
    write_text_atomically(page, "\n".join(text) + (f"\n{said}" if said else ""))
    write_json(out.with_suffix(".json"), {"command": command, "base": base, "arms": held})
