"""Inputs as they are made up: a text, or the two texts of a pair."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from kilobayes.errors import KilobayesError
from kilobayes.tasks.data import Examples
from kilobayes.tasks.text import Documents

Row = tuple[str, ...]  # one or two texts


def of_examples(examples: Examples) -> list[Row]:
    """Texts, or pairs, of examples; their labels are left behind."""
    if examples.pairs is None:
        return [(text,) for text in examples.texts]
    return list(zip(examples.texts, examples.pairs, strict=True))


def of_documents(documents: Documents, words: int) -> list[Row]:
    """What a language model is given to go on from: prompts, or the first words of plain texts.

    Raises:
        KilobayesError: conversations, which cannot be made up.
    """
    if documents.form == "chat":
        raise KilobayesError(
            "conversations are not transferred", "rows of messages", "give texts, or prompts with completions"
        )
    if documents.form == "pairs":
        return [(str(prompt),) for prompt, _ in documents.rows]
    return [(" ".join(text.split()[:words]),) for text in documents.rows if text.strip()]


def to_examples(
    rows: Sequence[Row], classes: Sequence[str] = (), labels: Sequence[int] | None = None
) -> Examples:
    """Examples of rows of one kind."""
    paired = bool(rows) and len(rows[0]) == 2
    pairs = [row[1] for row in rows] if paired else None
    return Examples([row[0] for row in rows], pairs, None if labels is None else list(labels), list(classes))


def normal(row: Row) -> str:
    """What makes two rows the same: words in small letters, whatever stands between them."""
    return " | ".join(" ".join(re.findall(r"\w+", part.casefold())) for part in row)


def half(row: Row) -> int:
    """0 or 1, by the hash of the row: what trains a discriminator, and what it later judges."""
    return hashlib.sha256(normal(row).encode()).digest()[0] & 1
