"""``predict``."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kilobayes.commands import console
from kilobayes.commands.doubt import Doubt
from kilobayes.commands.runs import check_writable
from kilobayes.errors import KilobayesError


def predict(
    folder: Path,
    source: str,
    output: str,
    columns: dict[str, str | None],
    samples: int | None,
    batch_size: int,
    model: str | None,
    device: str,
    doubt: Doubt,
) -> None:
    """Predictions of every row, in order; the data are read before the model is loaded."""
    from kilobayes import store
    from kilobayes.workflows.data import load_as_trained, reads
    from kilobayes.workflows.evaluate import prediction_rows
    from kilobayes.workflows.finetune import load
    from kilobayes.workflows.run import cut

    card = store.read_card(folder)
    if output != "-":
        check_writable(Path(output))
    rows: Any = _standard_input() if source == "-" else source
    doubt.check(folder, samples, card.samples)
    examples = load_as_trained(folder, rows, read=reads(card), need_labels=False, **columns)
    held = doubt.rows(folder, card)
    fitted = load(folder, model=model, device=device)
    encoded = fitted.encode(examples)
    for line in cut(encoded.truncated, len(encoded), fitted, "input"):
        console.say(f"note: {line}")
    predictive = fitted.predict(encoded, samples, batch_size)
    records = list(prediction_rows(card.classes, predictive, examples))
    if doubt.asked:
        known = doubt.known(fitted, held, samples)
        doubt.add(records, predictive.probs.numpy(), known, card.classes)
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
        flat = [
            {k: json.dumps(v) if isinstance(v, list) else v for k, v in r.items() if k != "probs"}
            | {f"p({c})": p for c, p in r["probs"].items()}
            for r in records
        ]
        writer = csv.DictWriter(text, fieldnames=list(flat[0]) if flat else ["text"])
        writer.writeheader()
        writer.writerows(flat)
        write_text_atomically(Path(output), text.getvalue())
    else:
        write_lines(Path(output), records)
