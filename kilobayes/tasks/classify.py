"""Classification of texts or pairs of texts: tokens in, class scores out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kilobayes.errors import KilobayesError
from kilobayes.tasks.data import Examples


@dataclass(frozen=True, eq=False)
class Encoded:
    """Tokenised rows, unpadded.

    Attributes:
        ids: token ids of each row.
        type_ids: 0 for tokens of the first sentence and 1 for the second, or None if the tokenizer has none.
        labels: class indices ``(N,)`` int64, or None.
        truncated: how many rows were longer than ``max_length`` and were cut; for the caller to report.
        counts: how many of the classes each row has to choose from, the first ones; None for all.
    """

    ids: list[list[int]]
    type_ids: list[list[int]] | None
    labels: Tensor | None
    truncated: int
    counts: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Tensor) -> Encoded:
        """Some of the rows, in the order given; how many were cut is said of all."""
        which = rows.tolist()
        types = None if self.type_ids is None else [self.type_ids[i] for i in which]
        labels = None if self.labels is None else self.labels[rows]
        counts = None if self.counts is None else self.counts[rows]
        return Encoded([self.ids[i] for i in which], types, labels, self.truncated, counts)


@dataclass(frozen=True, eq=False)
class Classify:
    """The task of choosing one of C classes.

    Attributes:
        tokenizer: a Hugging Face tokenizer; never changed. Without a pad token, its end-of-text token pads.
        classes: class names in index order.
        max_length: longest row in tokens, special tokens included.

    Raises:
        KilobayesError: fewer than two classes, a ``max_length`` with no room for text or beyond the
            tokenizer's own limit, or a tokenizer with neither a pad nor an end-of-text token.
    """

    tokenizer: Any
    classes: Sequence[str]
    max_length: int = 128

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise KilobayesError(
                "classification needs at least two classes", f"found: {', '.join(self.classes) or 'none'}"
            )
        shortest = self.tokenizer.num_special_tokens_to_add(pair=True) + 2
        longest = self.tokenizer.model_max_length  # about 1e30 where the tokenizer states none
        if not shortest <= self.max_length <= longest:
            raise KilobayesError(
                f"a row of {self.max_length} tokens does not fit this model",
                f"possible are {shortest} to {longest if longest < 10**9 else 'any number of'} tokens",
                "change --max-length",
            )
        if self.pad_id is None:
            raise KilobayesError("the tokenizer has neither a pad token nor an end-of-text token")

    @property
    def pad_id(self) -> int | None:
        """The id that fills short rows; it never takes part in attention."""
        own = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if own is None else own

    def encode(self, examples: Examples) -> Encoded:
        """Tokenises every row once. Long rows lose tokens from the end (of the longer sentence of a pair).

        Raises:
            KilobayesError: a row without a single token, or a label that is no index of ``classes``.
        """
        rows = self._tokens(examples.texts, examples.pairs, truncation=False)
        long = [i for i, ids in enumerate(rows["input_ids"]) if len(ids) > self.max_length]
        if long:
            part = examples.take(long)
            cut = self._tokens(part.texts, part.pairs, truncation=True, max_length=self.max_length)
            for key, values in rows.items():
                for i, value in zip(long, cut[key]):
                    values[i] = value
        empty = next((i for i, ids in enumerate(rows["input_ids"]) if not ids), None)
        if empty is not None:
            raise KilobayesError(
                f"row {empty + 1} has no tokens", f"its text is {examples.texts[empty]!r:.60}"
            )
        return Encoded(
            rows["input_ids"], rows.get("token_type_ids"), class_indices(examples, self.classes), len(long)
        )

    def _tokens(
        self, texts: list[str], pairs: list[str] | None, **keywords: Any
    ) -> dict[str, list[list[int]]]:
        if not texts:
            return {"input_ids": []}
        # Padding is switched off by name: some tokenizer files (all-MiniLM-L6-v2) ask for a fixed length.
        out = self.tokenizer(
            texts,
            pairs,
            padding=False,
            add_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids="token_type_ids" in self.tokenizer.model_input_names,
            verbose=False,
            **keywords,
        )
        return {key: list(out[key]) for key in ("input_ids", "token_type_ids") if key in out}

    def collate(self, encoded: Encoded, indices: Sequence[int] | Tensor) -> dict[str, Tensor]:
        """One batch ``(B, T)`` int64, padded to its longest row on the tokenizer's side; no labels inside."""
        rows = [int(i) for i in indices]
        left = self.tokenizer.padding_side == "left"
        ids = [encoded.ids[i] for i in rows]
        assert self.pad_id is not None  # checked in __post_init__
        batch = padded(ids, self.pad_id, left)
        if encoded.type_ids is not None:
            types = [encoded.type_ids[i] for i in rows]
            batch["token_type_ids"] = padded(types, self.tokenizer.pad_token_type_id, left)["input_ids"]
        return batch

    def labels(self, encoded: Encoded, indices: Sequence[int] | Tensor) -> Tensor:
        """Class indices ``(B,)`` of these rows. Raises KilobayesError when the rows carry none."""
        return labels_of(encoded, indices)

    def nll(self, logits: Tensor, labels: Tensor) -> Tensor:
        """As :func:`class_nll`."""
        return class_nll(logits, labels)

    def within(self, model: nn.Module) -> AbstractContextManager[None]:
        """What the model is put into while it runs this task: nothing."""
        return nullcontext()

    def readout(self, output: Any) -> Tensor:
        """Class scores ``(rows, C)`` in float32 from a sequence-classification output."""
        return scores_of(output)


def class_indices(examples: Examples, classes: Sequence[str]) -> Tensor | None:
    """Class indices ``(N,)`` int64 of labelled examples, else None.

    Raises:
        KilobayesError: they were read with other classes.
    """
    if examples.labels is None:
        return None
    if list(examples.classes) != list(classes):
        raise KilobayesError(
            "these examples were read with other classes",
            f"found: {', '.join(examples.classes)}; the task has: {', '.join(classes)}",
            "read them with classes= those of the task",
        )
    return torch.tensor(examples.labels, dtype=torch.int64)


def padded(ids: Sequence[list[int]], pad: int, left: bool) -> dict[str, Tensor]:
    """Rows as ``input_ids`` and their ``attention_mask``, both ``(B, T)`` int64."""
    width = max(len(row) for row in ids)

    def filled(rows: Sequence[list[int]], fill: int) -> Tensor:
        short = [[fill] * (width - len(row)) for row in rows]
        lines = [gap + row if left else row + gap for gap, row in zip(short, rows)]
        return torch.tensor(lines, dtype=torch.int64)

    return {"input_ids": filled(ids, pad), "attention_mask": filled([[1] * len(row) for row in ids], 0)}


def labels_of(encoded: Encoded, rows: Sequence[int] | Tensor) -> Tensor:
    """Class indices ``(B,)`` of these rows. Raises KilobayesError when the rows carry none."""
    if encoded.labels is None:
        raise KilobayesError("these rows have no labels", "", "read them with a label column")
    return encoded.labels[torch.as_tensor(rows, dtype=torch.int64)]


def class_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood ``-log softmax(logits)[label]`` of each row, in nats.

    Args:
        logits: ``(S, B, C)``; computed in float32, or in float64 if that is what comes.
        labels: ``(B,)``, or ``(S, B)`` where members see different rows.

    Returns:
        ``(S, B)``, not averaged.
    """
    scores = logits if logits.dtype == torch.float64 else logits.float()
    index = labels.expand(logits.shape[:-1]).unsqueeze(-1)
    return -scores.log_softmax(-1).gather(-1, index).squeeze(-1)


def scores_of(output: Any) -> Tensor:
    """``logits`` of an output in float32, or in float64 if they are."""
    logits: Tensor = output.logits
    return logits if logits.dtype == torch.float64 else logits.float()
