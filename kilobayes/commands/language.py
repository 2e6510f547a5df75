"""``train``, ``check`` and ``evaluate`` for language models."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kilobayes.commands import console
from kilobayes.options import Options


def train(options: Options, *, as_json: bool) -> None:
    """Train and show the figures."""
    from kilobayes.workflows import language_run as work
    from kilobayes.workflows.language_evaluate import figures

    with console.bar("training") as watch:
        done = work.train(options, watch=watch, say=console.say)
    show([done.evaluation], [done.summary])
    sizes = ", ".join(f"{part} {console.human(size)}" for part, size in done.sizes.items() if size)
    console.say(f"sizes:  {sizes}")
    console.say(f"report: {done.folder / 'report.html'}")
    console.say(f'next:   kilobayes generate {shlex.quote(str(done.folder))} --prompt "Once upon a time"')
    if as_json:
        console.result({"run": str(done.folder), "metrics": figures(done.summary)})


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
    """Figures of a run on other texts, and files of them where ``out`` is named."""
    from kilobayes.metrics.language import summarise
    from kilobayes.workflows import language_evaluate as work
    from kilobayes.workflows.evaluate import metadata
    from kilobayes.workflows.folder import stored_cost
    from kilobayes.workflows.language import load
    from kilobayes.workflows.texts import for_run

    # the data first: loading a model takes longer
    documents, name = for_run(folder, data, split, columns, limit)
    other = for_run(folder, ood, None, {}, limit)[0] if ood else None
    fitted = dataclasses.replace(load(folder, model=model, device=device), cost=stored_cost(folder))
    found = work.evaluate(fitted, documents, other, samples=samples)
    facts = {"run": str(folder), "source": data, "split": name}
    if out is None:
        summary = summarise(found.scores, found.ood)
    else:
        (summary,) = work.write_outputs(out, [found], metadata(f"{folder.name} on {data}", facts, []))
        console.say(f"report: {out / 'report.html'}")
    show([found], [summary])
    if as_json:
        console.result(facts | {"metrics": work.figures(summary)})


def compare(
    folders: list[Path],
    data: str,
    split: str | None,
    ood: str | None,
    columns: dict[str, str | None],
    limit: int | None,
    samples: int | None,
    out: Path,
    model: str | None,
    device: str,
    *,
    as_json: bool,
) -> None:
    """One table and one report of several runs on the same texts."""
    from kilobayes.workflows import language_compare as work
    from kilobayes.workflows.compare import spread_lines
    from kilobayes.workflows.texts import for_run

    def texts() -> tuple[Any, Any, str]:
        documents, name = for_run(folders[0], data, split, columns, limit)
        return documents, for_run(folders[0], ood, None, {}, limit)[0] if ood else None, name

    done = work.compare(folders, texts, out, data, samples, model, device)
    show(done.evaluations, done.summaries)
    for one, less in zip(done.evaluations[1:], done.less_first, strict=True):
        console.say(f"{one.name}, less the first, by documents:")
        for key, label in (pair for pair in console.LANGUAGE_ROWS if pair[0] in less):
            shown = f"{less[key].value:+.4f}   {less[key].low:+.4f} to {less[key].high:+.4f}"
            console.say(f"{label.format(bins=15):>24} {shown}")
    for line in [*done.notes, *spread_lines(done.spreads, ("perplexity", "nll", "ece"))]:
        console.say(line)
    console.say(f"report: {out / 'report.html'}")
    if as_json:
        console.result(done.as_json())


def calibrate(
    adapter: Path, texts: Any, posterior: str | None, out: Path, given: dict[str, Any], *, as_json: bool
) -> None:
    """Fit a posterior to a finished adapter of a language model, or to a run."""
    from kilobayes.workflows import language_calibrate as work
    from kilobayes.workflows.frame import own_warnings
    from kilobayes.workflows.language_evaluate import figures

    with own_warnings() as warned:
        done = work.calibrate(adapter, texts, posterior, **given)
    done.notes.extend(dict.fromkeys(warned))
    for line in done.notes:
        console.say(f"note: {line}")
    evaluations, summaries = work.write(done, out, adapter, texts)
    if evaluations:
        show(evaluations, summaries)
        console.say(f"report: {out / 'report.html'}")
    console.say(f'next:   kilobayes generate {shlex.quote(str(out))} --prompt "Once upon a time"')
    console.say(f"run:    {out}")
    if as_json:
        found: dict[str, Any] = {
            "run": str(out),
            "posterior": done.fitted.card.posterior,
            "notes": done.notes,
        }
        if evaluations:
            found |= dict(zip(("before", "after"), map(figures, summaries), strict=True))
        console.result(found)


def show(evaluations: Sequence[Any], summaries: Sequence[Any]) -> None:
    """The table of one or several runs."""
    names, costs = [one.name for one in evaluations], [one.cost for one in evaluations]
    console.console.print(console.table(names, summaries, costs, rows=console.LANGUAGE_ROWS))
