"""Three rows, the examples they make and the files they are written to."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kilobayes.tasks.data import Examples

ROWS = [
    {"text": "good, really", "label": "yes"},
    {"text": 'a "bad" one', "label": "no"},
    {"text": "é\nß", "label": "no"},
]
EXPECTED = Examples([row["text"] for row in ROWS], None, [1, 0, 0], ["no", "yes"])


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    pandas = pytest.importorskip("pandas")
    frame, name = pandas.DataFrame(rows), path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        frame.to_parquet(path)
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows, indent=1))
    elif name.endswith(".jsonl"):
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, index=False, sep="\t" if ".tsv" in name else ",")
    return path


@pytest.fixture
def sample() -> SimpleNamespace:
    return SimpleNamespace(rows=ROWS, expected=EXPECTED, write=write)
