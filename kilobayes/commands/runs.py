"""``train``, ``predict``, ``evaluate``, ``compare`` and ``export``."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kilobayes.commands import console
from kilobayes.errors import KilobayesError
from kilobayes.options import Options


def train(options: Options, *, as_json: bool) -> None:
    from kilobayes.workflows import run
    from kilobayes.workflows.evaluate import headline

    with console.bar("training") as watch:
        done = run.train(options, watch=watch, say=console.say)
    cost = done.fitted.cost
    console.console.print(console.table([done.evaluation.name], [done.summary], [cost]))
    sizes = ", ".join(f"{part} {console.human(size)}" for part, size in done.sizes.items())
    console.say(f"bytes: {sizes}")
    console.say(f"report: {done.folder / 'report.html'}")
    console.say(f"next:   kilobayes predict {done.folder} --input texts.jsonl --output out.jsonl")
    if as_json:
        console.result({"run": str(done.folder)} | headline(done.evaluation, done.summary))


def predict(
    folder: Path,
    source: str,
    output: str,
    text_column: str | None,
    pair_column: str | None,
    samples: int | None,
    batch_size: int,
    model: str | None,
    device: str,
) -> None:
    from kilobayes import store
    from kilobayes.tasks.data import load_examples
    from kilobayes.workflows.evaluate import prediction_rows
    from kilobayes.workflows.finetune import load

    card = store.read_card(folder)
    rows: Any = _standard_input() if source == "-" else source
    examples = load_examples(rows, text_column=text_column, pair_column=pair_column, need_labels=False)
    fitted = load(folder, model=model, device=device)
    predictive = fitted.predict(examples, samples, batch_size)
    records = list(prediction_rows(card.classes, predictive, examples))
    _write(output, records)
    if output != "-":
        console.say(f"{len(records)} rows: {output}")


def _standard_input() -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(sys.stdin, 1):
        if line.strip():
            try:
                found = json.loads(line)
            except ValueError as error:
                raise KilobayesError(f"line {number} of standard input is no JSON", str(error)) from None
            rows.append(found if isinstance(found, dict) else {"text": str(found)})
    if not rows:
        raise KilobayesError("standard input is empty", remedy='give lines such as {"text": "..."}')
    return rows


def _write(output: str, records: Iterable[dict[str, Any]]) -> None:
    from kilobayes.files import write_lines, write_text_atomically

    if output == "-":
        for record in records:
            sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")
    elif output.endswith(".csv"):
        text = io.StringIO()
        flat = [{k: v for k, v in r.items() if k != "probs"} | {f"p({c})": p for c, p in r["probs"].items()} for r in records]
        writer = csv.DictWriter(text, fieldnames=list(flat[0]) if flat else ["text"])
        writer.writeheader()
        writer.writerows(flat)
        write_text_atomically(Path(output), text.getvalue())
    else:
        write_lines(Path(output), records)


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
    from dataclasses import replace

    from kilobayes.metrics import summarise
    from kilobayes.workflows import evaluate as work
    from kilobayes.workflows.finetune import load
    from kilobayes.workflows.run import stored_cost

    fitted = load(folder, model=model, device=device)
    fitted = replace(fitted, cost=stored_cost(folder))
    examples, other, name = _rows(data, split, ood, fitted.card.classes, columns, limit)
    found, predictive = work.evaluate(fitted, examples, other, samples=samples)
    if out is None:
        summary = summarise(found, bins=work.BINS)
    else:
        facts = {"source": data, "split": name, "rows": len(examples)}
        records = work.prediction_rows(fitted.card.classes, predictive, examples)
        (summary,) = work.write_outputs(out, [found], work.metadata(f"{folder.name} on {data}", facts, []), records)
        console.say(f"report: {out / 'report.html'}")
    console.console.print(console.table([found.name], [summary], [found.cost]))
    if as_json:
        console.result({"run": str(folder), "data": data, "split": name} | work.headline(found, summary))


def _rows(
    data: str, split: str | None, ood: str | None, classes: list[str], columns: dict[str, str | None], limit: int | None
) -> tuple[Any, Any, str]:
    from kilobayes.tasks.data import available_splits, load_examples
    from kilobayes.workflows.data import first_test

    name = split or first_test(available_splits(data))
    examples = load_examples(data, name, classes=classes, limit=limit, **columns)
    other = None
    if ood:
        other = load_examples(ood, first_test(available_splits(ood)), need_labels=False, limit=limit)
    return examples, other, name or ""


def compare(
    folders: list[Path],
    data: str,
    split: str | None,
    ood: str | None,
    label_column: str | None,
    limit: int | None,
    samples: int | None,
    out: Path,
    model: str | None,
    device: str,
    *,
    as_json: bool,
) -> None:
    from kilobayes.workflows import compare as work

    columns = {"label_column": label_column}
    done = work.compare(
        folders, lambda classes: _rows(data, split, ood, classes, columns, limit), out, data, samples, model, device
    )
    costs = [e.cost for e in done.evaluations]
    console.console.print(console.table([e.name for e in done.evaluations], done.summaries, costs))
    for line in done.spread_lines():
        console.say(line)
    console.say(f"report: {out / 'report.html'}")
    if as_json:
        console.result(done.as_json())


def export(folder: Path, to: str, out: Path, member: int, model: str | None) -> None:
    from kilobayes import host, tree
    from kilobayes.host.export import export_lora, export_merged
    from kilobayes.workflows.finetune import load

    kinds = {"lora": export_lora, "merged": export_merged}
    if to not in kinds:
        raise KilobayesError(f"cannot export to {to!r}", f"known: {', '.join(kinds)}", "as in --to lora")
    fitted = load(folder, model=model, device="cpu")
    mean = fitted.posterior.mean(fitted.state)
    if not 0 <= member < tree.size(mean):
        raise KilobayesError(f"there is no member {member}", f"the run has {tree.size(mean)}", "as in --member 0")
    host.write(fitted.model, tree.member(mean, member))
    kinds[to](fitted.model, out)
    console.say(f"{to}: {out} (the mean of the weights, which is not the mean of the predictions)")
