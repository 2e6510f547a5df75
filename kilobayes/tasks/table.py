"""Columns of values read from a file, before anybody decides what is text and what is a label.

Plain Python reads JSON lines, JSON, CSV and TSV (gzipped too), pyarrow reads Parquet. Nothing here touches a
network or writes a cache. Damaged files raise :class:`KilobayesError` with the file and line; no other
library's traceback.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from kilobayes.errors import KilobayesError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
LONGEST_LINE = 16 * 2**20  # bytes; a line beyond this is no example but a file of another kind


@dataclass(frozen=True)
class Table:
    """Columns of equal length.

    Attributes:
        name: what to call the source in an error, such as ``train.csv``.
        columns: column name to values, in the order of the source.
        class_names: names of the classes of an integer column, where the source carries them
        (``ClassLabel``).
    """

    name: str
    columns: dict[str, list[Any]]
    class_names: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))


def stem_and_kind(path: Path) -> tuple[str, str]:
    """``("train", ".jsonl")`` for ``train.jsonl.gz``; kind is "" for a file this module does not read."""
    name = path.name.removesuffix(".gz")
    kind = next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")
    return (name[: -len(kind)] if kind else name), kind


def read_file(path: Path) -> Table:
    """Reads one file by its ending (``.jsonl``, ``.json``, ``.csv``, ``.tsv``, each also ``.gz``;
    ``.parquet``).

    A ``.tsv`` whose quote marks do not follow the CSV rules (GLUE's do not) is read with quotes as plain
    characters; a ``.csv`` without a comma in its header may use semicolons. Blank lines are skipped.

    Raises:
        KilobayesError: unreadable, of an unknown kind, damaged (with the line number) or without rows.
    """
    kind = stem_and_kind(path)[1]
    if not kind:
        raise KilobayesError(
            f"cannot tell what kind of file {path.name} is",
            f"its ending is {path.suffix!r}",
            f"use {', '.join(SUFFIXES)}",
        )
    from kilobayes.tasks.arrow import read_parquet

    readers: dict[str, Callable[[Path], Table]] = {
        ".jsonl": _json_lines,
        ".json": _json,
        ".csv": _csv,
        ".tsv": _tsv,
        ".parquet": read_parquet,
    }
    try:
        table = readers[kind](path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise KilobayesError(
            f"{path.name} is a damaged gzip file", str(error), "copy or download it again"
        ) from None
    except OSError as error:
        raise KilobayesError(
            f"cannot read {path}", error.strerror or str(error), "check the path and its permissions"
        ) from None
    if len(table) == 0:
        raise KilobayesError(f"{path.name} has no rows", f"columns: {', '.join(table.columns) or 'none'}")
    return table


def _lines(path: Path) -> Iterator[str]:
    """Decoded lines with their ends; the errors name the line (1-based)."""
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    with cast(BinaryIO, opener(path, "rb")) as stream:
        number = 0
        while raw := stream.readline(LONGEST_LINE + 1):
            number += 1
            if len(raw) > LONGEST_LINE:
                raise KilobayesError(
                    f"line {number} of {path.name} is longer than {LONGEST_LINE // 2**20} MiB",
                    "one example a line was expected",
                )
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _binary(path, number, f"byte 0x{raw[error.start]:02x}") from None
            if "\0" in line:
                raise _binary(path, number, "a zero byte")
            yield line


def _binary(path: Path, number: int, found: str) -> KilobayesError:
    return KilobayesError(
        f"line {number} of {path.name} is not UTF-8 text", f"found {found}", "save the file as UTF-8"
    )


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = (
            f"{error.msg} at line {error.lineno}, character {error.colno}"
            if "\n" in text.strip()
            else error.msg
        )
        raise KilobayesError(
            f"{where} is not JSON", f"{place}: {text[max(error.pos - 20, 0) :][:60]!r}"
        ) from None
    except (RecursionError, ValueError) as error:  # nesting without end, a number of thousands of digits
        raise KilobayesError(f"{where} is not usable JSON", str(error)) from None


def _from_rows(name: str, rows: list[Any], numbers: list[int] | None = None) -> Table:
    columns: dict[str, list[Any]] = {}
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            where = f"row {i + 1}" if numbers is None else f"line {numbers[i]}"
            raise KilobayesError(
                f"{where} of {name} is not an object",
                f"found {json.dumps(row)[:60]}",
                'expected {"text": ..., "label": ...}',
            )
        for key, value in row.items():
            if key not in columns:
                columns[key] = [None] * i
            columns[key].append(value)
        for values in columns.values():
            if len(values) <= i:
                values.append(None)
    return Table(name, columns)


def _json_lines(path: Path) -> Table:
    rows, numbers = [], []
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            rows.append(_parse(line, f"line {number} of {path.name}"))
            numbers.append(number)
    return _from_rows(path.name, rows, numbers)


def _json(path: Path) -> Table:
    """A list of objects, an object of equally long columns, an object holding one such list, JSON lines."""
    first = next((line for line in _lines(path) if line.strip()), "")
    if first.lstrip().startswith("{"):
        try:
            json.loads(first)
        except (ValueError, RecursionError):
            pass
        else:
            whole_object = sum(1 for line in _lines(path) if line.strip()) == 1
            if not whole_object:
                return _json_lines(path)
    value = _parse("".join(_lines(path)), path.name)
    if isinstance(value, dict):
        lists = {key: item for key, item in value.items() if isinstance(item, list)}
        if len(lists) == 1 and all(isinstance(row, dict) for row in next(iter(lists.values()))):
            value = next(iter(lists.values()))
        elif lists and len(lists) == len(value) and len({len(item) for item in lists.values()}) == 1:
            return Table(path.name, lists)
        else:
            value = [value]
    if not isinstance(value, list):
        raise KilobayesError(f"{path.name} is not a list of objects", f"found {type(value).__name__}")
    return _from_rows(path.name, value)


def _csv(path: Path) -> Table:
    header = next((line for line in _lines(path) if line.strip()), "")
    return _delimited(path, ";" if ";" in header and "," not in header else ",", csv.QUOTE_MINIMAL)


def _tsv(path: Path) -> Table:
    try:
        return _delimited(path, "\t", csv.QUOTE_MINIMAL)
    except KilobayesError:
        return _delimited(path, "\t", csv.QUOTE_NONE)


def _delimited(path: Path, delimiter: str, quoting: int) -> Table:
    reader = csv.reader(_lines(path), delimiter=delimiter, quoting=cast(Any, quoting), strict=True)
    header: list[str] = []
    rows: list[list[str]] = []
    try:
        for fields in reader:
            if not any(fields) and len(fields) <= 1:
                continue
            if not header:
                header = [name.strip() for name in fields]
                continue
            if len(fields) != len(header):
                raise KilobayesError(
                    f"line {reader.line_num} of {path.name} has {len(fields)} fields",
                    f"the header has {len(header)}: {', '.join(header)}",
                    "put quotes around fields that hold the separator, or use JSON lines",
                )
            rows.append(fields)
    except csv.Error as error:
        raise KilobayesError(
            f"line {reader.line_num} of {path.name} is not valid {stem_and_kind(path)[1][1:].upper()}",
            str(error),
            "check the quotes on that line",
        ) from None
    repeated = {name for name in header if header.count(name) > 1}
    if repeated:
        raise KilobayesError(f"{path.name} names a column twice", f"header: {', '.join(header)}")
    return Table(path.name, {name: [row[i] for row in rows] for i, name in enumerate(header)})
