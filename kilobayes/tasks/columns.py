"""Which columns hold the text and the label, and which class each label means."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from kilobayes.errors import KilobayesError, nearest
from kilobayes.tasks.table import Table

PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("sentence_a", "sentence_b"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("question", "sentence"),
    ("question", "passage"),
    ("question", "context"),
)
TEXTS = (
    "text",
    "sentence",
    "content",
    "review",
    "document",
    "comment",
    "tweet",
    "utterance",
    "query",
    "question",
    "body",
    "message",
    "description",
    "abstract",
    "headline",
    "title",
    "statement",
    "prompt",
    "input",
    "sentence1",
    "premise",
)
LABELS = (
    "label",
    "labels",
    "coarse_label",
    "label_coarse",
    "gold_label",
    "label_text",
    "class",
    "category",
    "target",
    "sentiment",
    "intent",
    "topic",
    "emotion",
    "stance",
    "rating",
    "stars",
    "y",
)
KEYS = {"id", "idx", "guid", "uid", "index", "unnamed: 0"}


def _named(table: Table, name: str, flag: str) -> str:
    if name in table.columns:
        return name
    guess = nearest(name, table.columns)
    raise KilobayesError(
        f'column "{name}" is not in {table.name}',
        f"found: {', '.join(table.columns)}",
        f"did you mean {flag} {guess}?" if guess else f"give {flag} with one of these",
    )


def label_column(table: Table, asked: str | None, required: bool) -> str | None:
    """The column asked for, else the first well-known name, else the only column with class names.

    Raises:
        KilobayesError: the column asked for is absent, or none was found though one is required.
    """
    if asked is not None:
        return _named(table, asked, "--label-column")
    lower = {name.lower(): name for name in reversed(table.columns)}
    for name in LABELS:
        if name in lower:
            return lower[name]
    if len(table.class_names) == 1:
        return next(iter(table.class_names))
    if required:
        raise KilobayesError(
            f"no label column recognised in {table.name}",
            f"found: {', '.join(table.columns)}",
            "name it with --label-column NAME",
        )
    return None


def text_columns(
    table: Table, text: str | None, pair: str | None, label: str | None
) -> tuple[str, str | None]:
    """The columns of the first and second sentence.

    A column asked for is taken; asking for a text column alone means there is no second sentence. Otherwise
    the first well-known pair of names, then the first well-known name (``text``, ``sentence``, ...; case does
    not matter), then the only column of strings that is neither the label nor an identifier.

    Raises:
        KilobayesError: a column asked for is absent, or the text cannot be told from the names.
    """
    if text is not None:
        return _named(table, text, "--text-column"), pair and _named(table, pair, "--pair-column")
    second = pair and _named(table, pair, "--pair-column")
    lower = {name.lower(): name for name in reversed(table.columns) if name not in (label, second)}
    if second is None:
        for one, two in PAIRS:
            if one in lower and two in lower:
                return lower[one], lower[two]
    for name in TEXTS:
        if name in lower:
            return lower[name], second
    strings = [name for name in lower.values() if name.lower() not in KEYS and _is_text(table.columns[name])]
    if len(strings) == 1:
        return strings[0], second
    raise KilobayesError(
        f"no text column recognised in {table.name}"
        if not strings
        else f"{table.name} has several columns of text",
        f"found: {', '.join(strings[::-1] or table.columns)}",
        "name it with --text-column NAME (and --pair-column NAME for a second sentence)",
    )


def _is_text(values: Sequence[Any]) -> bool:
    first = next((value for value in values if value is not None), None)
    return isinstance(first, str) and re.fullmatch(r"\s*-?[\d.]*\s*", first) is None


def read_text(table: Table, column: str) -> list[str]:
    """The strings of a column.

    Raises:
        KilobayesError: a missing or blank value or one that is no string, with its row (from 1).
    """
    values = table.columns[column]
    for row, value in enumerate(values, 1):
        where = f'row {row} of {table.name} has no usable text in column "{column}"'
        if not isinstance(value, str):
            found = "it is empty" if _missing(value) else f"it holds {value!r:.60} ({type(value).__name__})"
            raise KilobayesError(
                where, found, "fill it in, drop the row or name another column with --text-column"
            )
        if not value.strip():
            raise KilobayesError(where, "it is blank", "fill it in or drop the row")
        if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            raise KilobayesError(where, "it holds half a surrogate pair", "mend the encoding of the file")
    return list(values)


def _missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and value != value)


def read_labels(table: Table, column: str, classes: Sequence[Any] | None) -> tuple[list[int], list[str]]:
    """Class indices and class names of a column.

    Without ``classes``, the names are those the source carries (``ClassLabel``), else the distinct values as
    strings, whole numbers in numeric order and strings in alphabetical order. With ``classes``, their order
    holds; values match by name (``"1"`` matches 1), and when no whole number is a class name but all labels
    are, they are indices.

    Raises:
        KilobayesError: a missing label, a fraction, or a label outside ``classes``; row (from 1), label,
        known classes.
    """
    values = table.columns[column]
    named = table.class_names.get(column)
    raw = [_label(table, column, row, value, named) for row, value in enumerate(values, 1)]
    names = [named[int(value)] for value in raw] if named else raw
    if classes is None:
        known = list(named) if named else sorted(set(raw), key=_order)
        index = {name: i for i, name in enumerate(known)}
        return [index[name] for name in names], known

    known = [_canonical(name) for name in classes]
    if len(set(known)) < len(known):
        raise KilobayesError("a class is named twice", f"classes: {', '.join(known)}")
    ways = [(names, {name: i for i, name in enumerate(known)})]
    if not any(map(_whole, known)):
        ways.append((raw, {str(i): i for i in range(len(known))}))
    elif named:
        ways.append((raw, ways[0][1]))
    for read, index in ways:
        if all(name in index for name in read):
            return [index[name] for name in read], known
    row = next(i for i, name in enumerate(names) if name not in ways[0][1])
    guess = nearest(names[row], known)
    raise KilobayesError(
        f'row {row + 1} of {table.name} has the unknown label "{names[row]}" in column "{column}"',
        f"known classes: {', '.join(known)}",
        f'did you mean "{guess}"?'
        if guess
        else "name another column with --label-column, or train on all the classes",
    )


def _label(table: Table, column: str, row: int, value: Any, named: list[str] | None) -> str:
    where = f'row {row} of {table.name} has no usable label in column "{column}"'
    if _missing(value) or (isinstance(value, str) and not value.strip()):
        raise KilobayesError(where, "it is empty", "fill it in or drop the row")
    if not isinstance(value, str | int | float) or (isinstance(value, float) and not value.is_integer()):
        raise KilobayesError(where, f"it holds {value!r:.60}", "classes are names or whole numbers")
    label = _canonical(value)
    if named is not None and not (_whole(label) and 0 <= int(label) < len(named)):
        # The hub marks the hidden labels of a test split with -1.
        raise KilobayesError(
            where, f"it holds {label}, of {len(named)} classes", "use a split whose labels are public"
        )
    return label


def _canonical(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _whole(name: str) -> bool:
    return re.fullmatch(r"-?\d{1,18}", name, re.ASCII) is not None


def _order(name: str) -> tuple[bool, int, str]:
    whole = _whole(name)
    return not whole, int(name) if whole else 0, name
