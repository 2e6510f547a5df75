"""``train``, ``evaluate`` and ``compare``."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from kilobayes.commands import console
from kilobayes.commands.doubt import Doubt
from kilobayes.errors import KilobayesError
from kilobayes.options import Options


def train(options: Options, *, as_json: bool) -> None:
    """Train and show the figures; Ctrl-C exits with 130 and says how to go on."""
    from kilobayes.workflows.folder import CHECKPOINT, default_folder, steps

    folder = Path(options.out) if options.out else default_folder(options)
    try:
        _train(options, as_json)
    except KeyboardInterrupt:
        if not (folder / CHECKPOINT).exists():
            console.say("stopped before the first checkpoint; nothing is kept")
        else:
            done, planned = steps(folder)
            where = f"after step {done} of {planned}, " if done < planned else "after training, "
            console.say(f"stopped {where}with a checkpoint; to go on, type")
            console.say(f"  {shlex.join(['kilobayes', 'train', '--resume', '--out', str(folder)])}")
        raise SystemExit(130) from None


def _train(options: Options, as_json: bool) -> None:
    if options.task == "lm":
        from kilobayes.commands import language

        language.train(options, as_json=as_json)
        return
    from kilobayes.workflows import run
    from kilobayes.workflows.evaluate import headline

    with console.bar("training") as watch:
        done = run.train(options, watch=watch, say=console.say)
    console.console.print(console.table([done.evaluation.name], [done.summary], [done.fitted.cost]))
    sizes = ", ".join(f"{part} {console.human(size)}" for part, size in done.sizes.items())
    folder = shlex.quote(str(done.folder))
    console.say(f"sizes:  {sizes}")
    console.say(f"report: {done.folder / 'report.html'}")
    console.say(f"next:   kilobayes predict {folder} --input texts.jsonl --output out.jsonl")
    if as_json:
        console.result({"run": str(done.folder)} | headline(done.evaluation, done.summary))


def check_writable(path: Path) -> None:
    """Make the folder of a file that is written at the end, so that no work is lost for want of it.

    Raises:
        KilobayesError: it cannot be made or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise (
                IsADirectoryError(0, "it is a folder")
                if path.is_dir()
                else PermissionError(0, "no permission")
            )
    except OSError as error:
        raise KilobayesError(
            f"{path} cannot be written", error.strerror or str(error), "name another"
        ) from None


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
    doubt: Doubt,
    *,
    as_json: bool,
) -> None:
    """Figures of a run on labelled rows, and files of them where ``out`` is named."""
    from dataclasses import replace

    from kilobayes import store
    from kilobayes.metrics import summarise
    from kilobayes.workflows import evaluate as work
    from kilobayes.workflows.finetune import load
    from kilobayes.workflows.folder import stored_cost

    card = store.read_card(folder, "")
    if card.task == "lm":
        from kilobayes.commands import language

        given = (data, split, ood, columns, limit, samples, out, model, device)
        language.evaluate(folder, *given, as_json=as_json)
        return
    doubt.check(folder, samples, card.samples)
    # the data first: loading a model takes longer
    examples, other, name = _rows(folder, card, data, split, ood, columns, limit)
    held = doubt.rows(folder, card)
    fitted = load(folder, model=model, device=device)
    fitted = replace(fitted, cost=stored_cost(folder))
    if out is not None:
        check_writable(out / "metrics.json")
    found, predictive = work.evaluate(fitted, examples, other, samples=samples)
    if out is None:
        summary = summarise(found, bins=work.BINS)
    else:
        facts = {"source": data, "split": name, "rows": len(examples)}
        records = work.prediction_rows(fitted.card.classes, predictive, examples)
        (summary,) = work.write_outputs(
            out, [found], work.metadata(f"{folder.name} on {data}", facts, []), records
        )
        console.say(f"report: {out / 'report.html'}")
    console.console.print(console.table([found.name], [summary], [found.cost]))
    extra: dict[str, Any] = {}
    if doubt.asked:
        known = doubt.known(fitted, held, samples)
        extra = {"sets": doubt.measured(found.probs, found.labels, known)}
    if as_json:
        facts = {"run": str(folder), "data": data, "split": name}
        console.result(facts | work.headline(found, summary) | extra)


def _rows(
    folder: Path,
    card: Any,
    data: str,
    split: str | None,
    ood: str | None,
    columns: dict[str, Any],
    limit: int | None,
) -> tuple[Any, Any, str]:
    from kilobayes.tasks.data import available_splits
    from kilobayes.workflows.data import first_test, load_as_trained, reads

    name = split or first_test(available_splits(data))
    examples = load_as_trained(
        folder, data, name, read=reads(card), classes=card.classes, limit=limit, **columns
    )
    other = None
    if ood:
        other = reads(card)(ood, first_test(available_splits(ood)), need_labels=False, limit=limit)
    return examples, other, name or ""


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
    """One table and one report of several runs on the same rows."""
    from kilobayes import store
    from kilobayes.workflows import compare as work

    check_writable(out / "metrics.json")
    if folders and store.read_card(folders[0], "").task == "lm":
        from kilobayes.commands import language

        given = (data, split, ood, columns, limit, samples, out, model, device)
        language.compare(folders, *given, as_json=as_json)
        return
    done = work.compare(
        folders,
        lambda card: _rows(folders[0], card, data, split, ood, columns, limit),
        out,
        data,
        samples,
        model,
        device,
    )
    costs = [e.cost for e in done.evaluations]
    console.console.print(console.table([e.name for e in done.evaluations], done.summaries, costs))
    for line in work.spread_lines(done.spreads, ("accuracy", "nll", "ece")):
        console.say(line)
    console.say(f"report: {out / 'report.html'}")
    if as_json:
        console.result(done.as_json())
