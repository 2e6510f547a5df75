"""Files that are there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def digest(rows: Iterable[str]) -> str:
    """SHA-256 of rows of text, in order."""
    return hashlib.sha256("\x1e".join(rows).encode()).hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write; afterwards it is flushed to disk and takes the place of ``path``.

    What was there stays until then, or if the writing fails. The name is always the same, so that what a
    killed run left is written over.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text_atomically(path: Path, text: str) -> None:
    """A text file in UTF-8 that is there whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """An object, indented; numbers that JSON lacks are an error."""
    write_text_atomically(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """One JSON object a line."""
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    write_text_atomically(path, "".join(lines))
