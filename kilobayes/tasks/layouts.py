"""Where a table of questions keeps its options and the right answer; data sets differ in little else."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kilobayes.errors import KilobayesError, nearest
from kilobayes.tasks.prompt import LETTERS
from kilobayes.tasks.table import Table

LISTS = ("choices", "options", "endings")
NUMBERED = re.compile(r"(?:(option|choice|answer|ending|sol|opt)[ _]?)(\d|[A-Za-z])")
QUESTIONS = (
    "question", "question_stem", "goal", "stem", "sentence", "ctx", "prompt", "query", "text", "input",
)  # fmt: skip
CONTEXTS = ("passage", "context", "support")
ANSWERS = ("answer", "answerkey", "answer_key", "correct", "correct_answer", "gold", "label", "target")


@dataclass(frozen=True)
class Layout:
    """Options of every row.

    Attributes:
        options: their texts.
        marks: how the source names them, such as A to D or 1 to 4, or None.
        columns: columns that they stand in.
    """

    options: list[list[str]]
    marks: list[list[str]] | None
    columns: list[str]


def find_options(table: Table) -> Layout | None:
    """Options in a column of lists, or in columns of one each (``option1``, ``answerA``, ``A``), or None.

    Raises:
        KilobayesError: a row with fewer than two, more than there are letters, or a blank one.
    """
    lower = {name.lower(): name for name in reversed(table.columns)}
    for name in (lower[key] for key in LISTS if key in lower):
        values = [_parsed(value) for value in table.columns[name]]
        if values and isinstance(values[0], list | tuple | dict):
            rows = [_listed(value, row, name, table.name) for row, value in enumerate(values, 1)]
            marks = [m for _, m in rows]
            named = None if any(m is None for m in marks) else [m or [] for m in marks]
            return _checked(Layout([texts for texts, _ in rows], named, [name]), table.name)
    for family in _families(table):
        options, kept = [], []
        for row in range(len(table)):
            cells = [(mark, table.columns[name][row]) for mark, name in family]
            while len(cells) > 2 and cells[-1][1] in (None, ""):
                cells.pop()
            options.append([cell if isinstance(cell, str) else str(cell or "") for _, cell in cells])
            kept.append([mark for mark, _ in cells])
        return _checked(Layout(options, kept, [name for _, name in family]), table.name)
    return None


def _parsed(value: Any) -> Any:
    """A list that a CSV file holds as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _listed(value: Any, row: int, name: str, where: str) -> tuple[list[str], list[str] | None]:
    """Texts and names of one row's options."""
    if isinstance(value, dict):
        texts, marks = value.get("text"), value.get("label")
    elif isinstance(value, list | tuple) and value and all(isinstance(v, dict) for v in value):
        texts, marks = [v.get("text") for v in value], [v.get("label") for v in value]
    else:
        texts, marks = value, None
    if not isinstance(texts, list | tuple) or any(isinstance(v, dict | list | tuple) for v in texts):
        raise KilobayesError(
            f'row {row} of {where} has no list of options in "{name}"', f"found {value!r:.60}"
        )
    known = isinstance(marks, list | tuple) and len(marks) == len(texts) and None not in marks
    return ["" if v is None else str(v) for v in texts], [str(m) for m in marks] if known and marks else None


def _families(table: Table) -> list[list[tuple[str, str]]]:
    """Columns that belong together, as (mark, name) in order."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for name in table.columns:
        found = NUMBERED.fullmatch(name)
        if found:
            groups.setdefault(found[1], []).append((found[2], name))
        elif len(name) == 1 and name in LETTERS:
            groups.setdefault("", []).append((name, name))
    families = [sorted(group) for group in groups.values()]
    return [f for f in families if len(f) > 1 and f[0][0].upper() in ("0", "1", "A")]


def _checked(layout: Layout, where: str) -> Layout:
    for row, texts in enumerate(layout.options, 1):
        if not 2 <= len(texts) <= len(LETTERS):
            raise KilobayesError(
                f"row {row} of {where} has {len(texts)} options", f"2 to {len(LETTERS)} can be told apart"
            )
        if not all(text.strip() for text in texts):
            raise KilobayesError(f"row {row} of {where} has a blank option", f"found {texts!r:.80}")
    return layout


def find_question(table: Table, asked: str | None, layout: Layout | None) -> str:
    """The column of the question: the one asked for, else the first well-known name.

    Raises:
        KilobayesError: it is not there.
    """
    if asked is not None and asked in table.columns:
        return asked
    lower = {n.lower(): n for n in reversed(table.columns) if layout is None or n not in layout.columns}
    found = None if asked is not None else next((lower[name] for name in QUESTIONS if name in lower), None)
    if found is None:
        guess = nearest(asked, table.columns) if asked is not None else None
        raise KilobayesError(
            f'column "{asked}" is not in {table.name}'
            if asked is not None
            else f"no column of questions recognised in {table.name}",
            f"found: {', '.join(table.columns)}",
            f"did you mean --text-column {guess}?" if guess else "name it with --text-column NAME",
        )
    return found


def find_answer(table: Table, asked: str | None, layout: Layout, required: bool) -> str | None:
    """The column of the right option: the one asked for, else the first well-known name.

    Raises:
        KilobayesError: it is not there, though asked for or required.
    """
    if asked is not None and asked in table.columns:
        return asked
    lower = {n.lower(): n for n in reversed(table.columns) if n not in layout.columns}
    found = None if asked is not None else next((lower[name] for name in ANSWERS if name in lower), None)
    if found is None and (required or asked is not None):
        guess = nearest(asked, table.columns) if asked is not None else None
        raise KilobayesError(
            f'column "{asked}" is not in {table.name}'
            if asked is not None
            else f"no column of right answers recognised in {table.name}",
            f"found: {', '.join(table.columns)}",
            f"did you mean --label-column {guess}?" if guess else "name it with --label-column NAME",
        )
    return found


def read_answers(table: Table, column: str, layout: Layout) -> list[int]:
    """Index of each row's right option.

    The whole column is read in one way: by the source's own names of the options (where it holds text), by
    letters, by numbers from 0, by numbers from 1, or by the options' texts.

    Raises:
        KilobayesError: no one way reads all rows; the first row that the best way does not read.
    """
    values = table.columns[column]
    text = all(isinstance(v, str) for v in values)
    names = [_name(v) for v in values]
    rows = layout.options
    marks = layout.marks
    from_zero = [[str(i) for i in range(len(r))] for r in rows]
    from_one = [[str(i + 1) for i in range(len(r))] for r in rows]
    ways: list[Sequence[Sequence[str]]] = [[[*LETTERS[: len(r)]] for r in rows], from_zero, from_one, rows]
    if marks is not None:
        ways = [marks, *ways] if text else [*ways, marks]
    best, reached = ways[0], -1
    for way in ways:
        bad = next((i for i, (name, known) in enumerate(zip(names, way)) if name not in known), None)
        if bad is None:
            return [list(known).index(name) for name, known in zip(names, way)]
        if bad > reached:
            best, reached = way, bad
    raise KilobayesError(
        f'row {reached + 1} of {table.name} has the answer {values[reached]!r:.60} in column "{column}"',
        f"its options: {', '.join(best[reached])[:200]}",
        "name another column with --label-column, or mend the row",
    )


def _name(value: Any) -> str:
    whole = isinstance(value, bool | int) or (isinstance(value, float) and value.is_integer())
    return str(int(value)) if whole else str(value).strip()
