"""Examples to classify, from a hub id, a file, a directory, a data frame or Python lists."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kilobayes.errors import KilobayesError
from kilobayes.tasks.columns import label_column as find_label
from kilobayes.tasks.columns import read_labels, read_text, text_columns
from kilobayes.tasks.prompt import Prompt
from kilobayes.tasks.sources import read_source
from kilobayes.tasks.sources import splits as available_splits
from kilobayes.tasks.split import stratified_holdout

__all__ = ["Examples", "available_splits", "limited", "load_examples"]


@dataclass(frozen=True)
class Examples:
    """Rows of one split, in order.

    Attributes:
        texts: the first, or only, sentence of each row.
        pairs: the second sentence of each row, or None.
        labels: class indices, or None where they are not known.
        classes: class names in index order (empty when there are no labels and none were given).
        prompt: how the rows are put to a language model; ``texts`` are then what it says of each row.
        options: the texts of each question's options, of rows that have such.
    """

    texts: list[str]
    pairs: list[str] | None
    labels: list[int] | None
    classes: list[str]
    prompt: Prompt | None = None
    options: list[list[str]] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Iterable[int]) -> Examples:
        """These rows, in this order (repeats allowed)."""
        rows = [int(i) for i in indices]
        return Examples(
            [self.texts[i] for i in rows],
            None if self.pairs is None else [self.pairs[i] for i in rows],
            None if self.labels is None else [self.labels[i] for i in rows],
            self.classes,
            self.prompt,
            None if self.options is None else [self.options[i] for i in rows],
        )

    def shown(self, i: int) -> str:
        """Row i as a person reads it; a pair is joined with " / "."""
        return self.texts[i] if self.pairs is None else f"{self.texts[i]} / {self.pairs[i]}"


def load_examples(
    source: Any,
    split: str | None = None,
    *,
    text_column: str | None = None,
    pair_column: str | None = None,
    label_column: str | None = None,
    classes: Sequence[Any] | None = None,
    limit: int | None = None,
    seed: int = 0,
    need_labels: bool = True,
) -> Examples:
    """Reads one split.

    Args:
        source: a hub id (``"owner/name"`` or ``"owner/name:configuration"``); a directory with
            ``train.jsonl``, ``validation.jsonl.gz``, ``test.csv`` and the like, or one written by
            ``datasets``; a single file, which is the split ``train``; a pandas ``DataFrame``; a ``datasets``
            object; a list of objects; a dictionary of columns; ``(texts, labels)`` with texts that are
            strings or pairs of strings; a list of such texts.
        split: name of the split; not needed where there is only one.
        text_column, pair_column, label_column: columns by name; guessed from well-known names otherwise.
        classes: the classes and their order, as found in training. Labels outside them are an error.
        limit: keep at most so many rows: a random subset that depends on ``seed`` only, in proportion to the
            classes when there are labels, in the order of the source. ``classes`` stay those of the whole
            split.
        seed: seed of that subset.
        need_labels: when False, labels are not read unless ``label_column`` names them.

    Raises:
        KilobayesError: anything that cannot be read as asked, with the file, the row or line, and what to do.
    """
    if isinstance(source, Examples):
        classes = source.classes or None if classes is None else classes
        source = _as_columns(source)
        label_column = label_column or ("label" if need_labels and "label" in source else None)
    table = read_source(source, split)
    label = find_label(table, label_column, required=need_labels)
    first, second = text_columns(table, text_column, pair_column, label)
    labels, names = None, [str(name) for name in classes or ()]
    texts = read_text(table, first)
    pairs = read_text(table, second) if second else None
    if label is not None and (need_labels or label_column is not None):
        labels, names = read_labels(table, label, classes)
    examples = Examples(texts, pairs, labels, names)
    return examples if limit is None else limited(examples, limit, seed)


def _as_columns(examples: Examples) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {"text": examples.texts}
    if examples.pairs is not None:
        columns = {"sentence1": examples.texts, "sentence2": examples.pairs}
    if examples.labels is not None:
        columns["label"] = [examples.classes[i] for i in examples.labels]
    return columns


def limited(examples: Examples, limit: int, seed: int) -> Examples:
    """At most ``limit`` rows, in proportion to the classes, in the order of the source.

    Raises:
        KilobayesError: a limit below 1.
    """
    if limit < 1:
        raise KilobayesError(
            "the limit on rows is not positive", f"found {limit}", "leave it out to use all rows"
        )
    if limit >= len(examples):
        return examples
    groups = np.zeros(len(examples), dtype=int) if examples.labels is None else np.asarray(examples.labels)
    return examples.take(stratified_holdout(groups, limit, seed)[1])
