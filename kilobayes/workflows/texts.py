"""Which texts a language model trains on, calibrates on and is evaluated on; torch is not needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kilobayes.errors import KilobayesError
from kilobayes.options import Options
from kilobayes.run_yaml import read_yaml
from kilobayes.tasks.text import Documents, load_documents, splits
from kilobayes.workflows.data import TESTS, first_test


@dataclass(frozen=True)
class Texts:
    """The rows of a run; ``test`` are the calibration rows where there are no others."""

    train: Documents
    calibration: Documents | None
    test: Documents
    ood: Documents | None
    test_name: str
    notes: list[str]


def load_texts(options: Options, source: Any = None) -> Texts:
    """Read what ``options`` name; calibration rows are held out of training unless named.

    Raises:
        KilobayesError: as reading documents; no data named; no rows to evaluate on.
    """
    source = source if source is not None else options.data
    if isinstance(source, str) and not source:
        raise KilobayesError("no data is named", remedy="as in --data texts.jsonl")
    named = {"text_column": options.text_column, "answer_column": options.label_column}
    there = splits(source)
    first = "train" if "train" in there or len(there) != 1 else there[0]
    train = load_documents(source, first, **named).limited(options.limit_train, options.seed)
    share, calibration, notes = options.held_out(), None, []
    if share:
        train, calibration = train.held_out(share, options.seed)
    elif share is None and options.calibration in there:
        calibration = load_documents(source, options.calibration, **named)
    elif share is None:
        calibration = load_documents(options.calibration, first_test(splits(options.calibration)), **named)
    name = options.test or next((t for t in TESTS if t in there and t != options.calibration), "")
    if name:
        where, split = (source, name) if name in there else (name, first_test(splits(name)))
        test = load_documents(where, split, **named).limited(options.limit, options.seed)
    elif calibration is not None:
        name, test = "calibration", calibration
        notes.append("There is no test split: the figures are of the rows that were also calibrated on.")
    else:
        raise KilobayesError(
            "there are no rows to evaluate on", "no test split, and --calibration 0", "name some with --test"
        )
    if first == name:
        notes.append("The rows evaluated on were trained on.")
    seen = set(map(repr, train.rows))
    if count := sum(repr(row) in seen for row in test.rows):
        notes.append(f"{count} of the {len(test)} rows evaluated on are also among the training rows.")
    ood = None
    if options.ood:
        ood = load_documents(options.ood, first_test(splits(options.ood))).limited(options.limit, 0)
    return Texts(train, calibration, test, ood, name, notes)


def for_run(
    folder: Path, source: Any, split: str | None, columns: dict[str, str | None], limit: int | None
) -> tuple[Documents, str]:
    """Texts for a run, and the split they are of; columns not named are those that it was trained on.

    Raises:
        KilobayesError: as reading documents.
    """
    settings = read_yaml(folder / "run.yaml") if (folder / "run.yaml").exists() else {}
    name = split or first_test(splits(source))
    text = columns.get("text_column")
    answer = columns.get("label_column")
    if columns and text is None and answer is None:
        text, answer = settings.get("text_column"), settings.get("label_column")
    found = load_documents(source, name, text_column=text, answer_column=answer)
    return found.limited(limit, 0), name or ""
