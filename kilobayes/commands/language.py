"""``train``, ``check`` and ``evaluate`` for language models."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

from kilobayes.commands import console
from kilobayes.options import Options


def train(options: Options, *, as_json: bool) -> None:
    """Train and show the figures."""
    from kilobayes.workflows import language_run as work

    with console.bar("training") as watch:
        done = work.train(options, watch=watch, say=console.say)
    show(done.summary)
    sizes = ", ".join(f"{part} {console.human(size)}" for part, size in done.sizes.items() if size)
    console.say(f"sizes:  {sizes}")
    console.say(f"page:   {done.folder / 'README.md'}")
    console.say(f'next:   kilobayes generate {shlex.quote(str(done.folder))} --prompt "Once upon a time"')
    if as_json:
        console.result({"run": str(done.folder), "metrics": work.figures(done.summary)})


def check(options: Options, *, as_json: bool) -> None:
    """What training would read and do; raises KilobayesError as training would."""
    from kilobayes.model_files import model_folder
    from kilobayes.workflows.folder import place
    from kilobayes.workflows.texts import load_texts

    options = place(options)
    texts = load_texts(options)
    facts: dict[str, Any] = {
        "model": str(model_folder(options.model)),
        "adapter": options.adapter,
        "posterior": options.posterior,
        "form": texts.train.form,
        "training_rows": len(texts.train),
        "calibration_rows": len(texts.calibration or []),
        "test_rows": len(texts.test),
        "test_split": texts.test_name,
        "ood_rows": len(texts.ood or []),
        "out": options.out,
        "notes": texts.notes,
    }
    if as_json:
        console.result({"ok": True} | facts | {"options": dataclasses.asdict(options)})
        return
    for key, value in facts.items():
        shown = ", ".join(map(str, value)) or "none" if isinstance(value, list) else value
        console.say(f"{key.replace('_', ' ')}: {shown}")
    console.say("all good; kilobayes train with the same flags trains")


def evaluate(
    folder: Path,
    data: str,
    split: str | None,
    ood: str | None,
    columns: dict[str, str | None],
    limit: int | None,
    samples: int | None,
    out: Path | None,
    model: str | None,
    device: str,
    *,
    as_json: bool,
) -> None:
    """Figures of a run on other texts, and ``metrics.json`` where ``out`` is named."""
    from kilobayes.workflows import language_run as work
    from kilobayes.workflows.language import load
    from kilobayes.workflows.texts import for_run

    # the data first: loading a model takes longer
    documents, name = for_run(folder, data, split, columns, limit)
    other = for_run(folder, ood, None, {}, limit)[0] if ood else None
    fitted = load(folder, model=model, device=device)
    scores = fitted.scores(documents, samples)
    elsewhere = fitted.scores(other, samples) if other is not None else None
    facts = {"run": str(folder), "source": data, "split": name}
    summary = work.write_figures(out, fitted, scores, elsewhere, facts, [])
    show(summary)
    if as_json:
        console.result(facts | {"metrics": work.figures(summary)})


def show(summary: dict[str, Any]) -> None:
    """A line for each figure, with its interval."""
    for key, found in summary.items():
        console.say(f"{key.replace('_', ' '):>24} {found.value:10.4f}   {found.low:.4f} to {found.high:.4f}")
