"""Texts to write like: rows of plain text, of prompts and completions, or of conversations."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kilobayes.errors import KilobayesError
from kilobayes.tasks.chat import messages_of
from kilobayes.tasks.columns import read_text, text_columns
from kilobayes.tasks.sources import read_source
from kilobayes.tasks.sources import splits as table_splits
from kilobayes.tasks.table import Table, stem_and_kind

CHATS = ("messages", "conversations", "conversation")
ANSWERS = ("completion", "response", "output", "answer", "answer1", "target", "chosen")
PROMPTS = ("prompt", "instruction", "question", "query", "input")
BLOCK = 4000  # characters of a text file that make a row, up to the end of a paragraph


@dataclass(frozen=True)
class Documents:
    """Rows of one split, in order.

    Attributes:
        form: ``text``; ``pairs`` of a prompt and what follows it; or ``chat``, whose replies are learned.
        rows: a text each; or ``(prompt, answer)``; or a list of messages.
    """

    form: str
    rows: list[Any]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Iterable[int]) -> Documents:
        """These rows, in this order."""
        return replace(self, rows=[self.rows[int(i)] for i in indices])

    def limited(self, limit: int | None, seed: int) -> Documents:
        """At most so many rows: a random subset in the order of the source."""
        if limit is None or limit >= len(self):
            return self
        gen = np.random.default_rng(seed)
        return self.take(sorted(gen.permutation(len(self))[:limit]))

    def held_out(self, share: float, seed: int) -> tuple[Documents, Documents]:
        """The rows to train on and those held out: a share below 1, or a number.

        Raises:
            KilobayesError: nothing would be left on one side.
        """
        count = max(round(share * len(self)), 1) if share < 1 else int(share)
        if not 0 < count < len(self):
            raise KilobayesError(
                f"cannot hold out {share:g} of {len(self)} rows",
                "both sides need at least one row",
                f"give --calibration a number from 1 to {max(len(self) - 1, 1)}, a file, or 0",
            )
        gen = np.random.default_rng(seed)
        order = gen.permutation(len(self))
        return self.take(sorted(order[count:])), self.take(sorted(order[:count]))


def load_documents(
    source: Any, split: str | None = None, *, text_column: str | None = None, answer_column: str | None = None
) -> Documents:
    """Reads one split.

    The form follows from the columns: ``messages`` or ``conversations`` are chats; ``instruction``, ``input``
    and ``output`` (Alpaca) are chats of one question; ``prompt`` and ``completion``, or ``question`` and
    ``answer``, are pairs; anything else with one column of text is plain text. A ``.txt`` file is cut at ends
    of paragraphs into rows of about 4,000 characters, of which nothing is lost.

    Args:
        source: as :func:`kilobayes.tasks.data.load_examples` takes it; a ``.txt`` file, or a folder of
            ``train.txt`` and the like; or documents, as they are.
        text_column: the column of the text; with ``answer_column`` that of the prompt.

    Raises:
        KilobayesError: what cannot be read as asked, with the row and what to do.
    """
    if isinstance(source, Documents):
        return source
    if (path := _text_file(source, split)) is not None:
        return Documents("text", _blocks(path))
    table = read_source(source, split)
    lower = {name.lower(): name for name in reversed(table.columns)}
    if answer_column is not None:
        return _pairs(table, _column(table, text_column, lower, PROMPTS), _named(table, answer_column))
    if text_column is not None:
        return Documents("text", read_text(table, _named(table, text_column)))
    if chat := next((lower[name] for name in CHATS if name in lower), None):
        where = f"of {table.name}, column {chat},"
        rows = [messages_of(v, f"row {i} {where}") for i, v in enumerate(table.columns[chat], 1)]
        return Documents("chat", rows)
    answer = next((lower[name] for name in ANSWERS if name in lower), None)
    if answer is not None and "instruction" in lower:
        return _alpaca(table, lower["instruction"], lower.get("input"), answer)
    if answer is not None and (prompt := next((lower[n] for n in PROMPTS if n in lower), None)):
        return _pairs(table, prompt, answer)
    return Documents("text", read_text(table, text_columns(table, None, None, None)[0]))


def splits(source: Any) -> list[str]:
    """Names of a source's splits; see :func:`kilobayes.tasks.data.available_splits`."""
    if isinstance(source, Documents):
        return ["train"]
    if isinstance(source, str | Path) and (path := Path(source)).exists():
        if path.is_file() and _is_text(path):
            return ["train"]
        if path.is_dir() and (found := _text_files(path)):
            return list(found)
    return table_splits(source)


def _is_text(path: Path) -> bool:
    return path.name.lower().removesuffix(".gz").endswith(".txt")


def _text_files(folder: Path) -> dict[str, Path]:
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and _is_text(p)]
    tables = any(p.is_file() and stem_and_kind(p)[1] for p in folder.iterdir())
    return {} if tables else {p.name.split(".")[0]: p for p in files}


def _text_file(source: Any, split: str | None) -> Path | None:
    if not isinstance(source, str | Path) or not (path := Path(source)).exists():
        return None
    if path.is_file():
        return path if _is_text(path) else None
    found = _text_files(path)
    if found and split not in found:
        raise KilobayesError(f"which split of {path}?", f"found: {', '.join(found)}", "name one of these")
    return found.get(split or "")


def _blocks(path: Path) -> list[str]:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise KilobayesError(f"{path} cannot be read as text", str(error)[:200], "save it as UTF-8") from None
    out, at = [], 0
    while at < len(text):
        cut = text.find("\n\n", at + BLOCK)
        end = len(text) if cut < 0 else cut + 2
        out.append(text[at:end])
        at = end
    if not text.strip():
        raise KilobayesError(f"{path} has no text")
    return out


def _named(table: Table, name: str) -> str:
    if name not in table.columns:
        raise KilobayesError(
            f'column "{name}" is not in {table.name}',
            f"found: {', '.join(table.columns)}",
            "name one of these",
        )
    return name


def _column(table: Table, asked: str | None, lower: dict[str, str], known: tuple[str, ...]) -> str:
    if asked is not None:
        return _named(table, asked)
    for name in known:
        if name in lower:
            return lower[name]
    raise KilobayesError(
        f"{table.name} has no column of prompts that is known",
        f"found: {', '.join(table.columns)}",
        "name it with --text-column",
    )


def _pairs(table: Table, prompt: str, answer: str) -> Documents:
    ask, reply = table.columns[prompt], table.columns[answer]
    if any(isinstance(v, list) for v in (*ask[:1], *reply[:1])):  # conversations in two parts
        where = f"of {table.name}"
        both = [
            messages_of([*_listed(a, "user"), *_listed(b, "assistant")], f"row {i} {where}")
            for i, (a, b) in enumerate(zip(ask, reply, strict=True), 1)
        ]
        return Documents("chat", both)
    return Documents("pairs", list(zip(read_text(table, prompt), read_text(table, answer), strict=True)))


def _listed(value: Any, role: str) -> list[Any]:
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _alpaca(table: Table, instruction: str, more: str | None, answer: str) -> Documents:
    """One question and one answer: what ``input`` holds follows the instruction after a blank line."""
    asked, replies = read_text(table, instruction), read_text(table, answer)
    inputs = table.columns[more] if more else [""] * len(asked)
    rows = []
    for number, (words, extra, reply) in enumerate(zip(asked, inputs, replies, strict=True), 1):
        if extra is not None and not isinstance(extra, str):
            raise KilobayesError(
                f'row {number} of {table.name} has no usable text in column "{more}"', f"found {extra!r:.60}"
            )
        question = f"{words}\n\n{extra}" if extra and extra.strip() else words
        rows.append([{"role": "user", "content": question}, {"role": "assistant", "content": reply}])
    return Documents("chat", rows)


def shown(row: Any) -> str:
    """A row's text as a person reads it."""
    if isinstance(row, str):
        return row
    return "\n".join(row) if isinstance(row, tuple) else "\n".join(m["content"] for m in row)
