"""Token rows of a language model: long texts in windows, short rows together in one."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True, eq=False)
class Tokens:
    """Rows of a language model, unpadded.

    Attributes:
        ids: what the model reads, token ids of each row.
        labels: what follows each token, or -100 where that does not count.
        starts: where texts start in a row: ``[0]``, or several places in a packed one.
        documents: which document a row is of; a packed row is its own.
        bytes: UTF-8 bytes of the counted text, by document.
        truncated: documents that lost their end; for the caller to report.
        dropped: documents that were left out, since no answer was left of them.
    """

    ids: list[list[int]]
    labels: list[list[int]]
    starts: list[list[int]]
    documents: list[int]
    bytes: list[int]
    truncated: int = 0
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def counted(self) -> list[int]:
        """Tokens that count, of each row."""
        return [sum(label != IGNORED for label in row) for row in self.labels]

    @property
    def mean_counted(self) -> float:
        """Mean number of tokens that count in a row: what a row's loss is divided by."""
        return sum(self.counted) / max(len(self), 1)

    @property
    def packed(self) -> bool:
        """Whether a row may hold several texts."""
        return any(len(starts) > 1 for starts in self.starts)

    def take(self, rows: Tensor | Sequence[int]) -> Tokens:
        """Some of the rows; bytes and counts are still those of all documents."""
        which = [int(i) for i in rows]
        return replace(
            self,
            ids=[self.ids[i] for i in which],
            labels=[self.labels[i] for i in which],
            starts=[self.starts[i] for i in which],
            documents=[self.documents[i] for i in which],
        )


def windows(ids: Sequence[int], longest: int) -> list[tuple[list[int], list[int]]]:
    """A text's tokens as rows ``(ids, labels)`` of at most ``longest`` tokens, the last label's included.

    The last token of a window is the first of the next, so every token but the very first is a label exactly
    once: ``ceil((len(ids) - 1) / (longest - 1))`` windows.
    """
    step = longest - 1
    return [
        (list(ids[at : at + step][: len(ids) - 1 - at]), list(ids[at + 1 : at + 1 + step]))
        for at in range(0, len(ids) - 1, step)
    ]


def pack(tokens: Tokens, longest: int) -> Tokens:
    """Short rows together in rows of at most ``longest`` tokens: each into the fullest row that has room.

    The longest come first (best fit decreasing), so the result depends on the lengths and the order alone. A
    packed row is one document of its own, with the bytes of all that is in it.
    """
    order = sorted(range(len(tokens)), key=lambda i: -len(tokens.ids[i]))
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for i in order:
        size = len(tokens.ids[i])
        at = bisect.bisect_left(room, (size, -1))
        if at == len(room):
            left, where = longest, len(bins)
            bins.append([])
        else:
            left, where = room.pop(at)
        bins[where].append(i)
        bisect.insort(room, (left - size, where))
    share = [tokens.bytes[d] for d in tokens.documents]
    seen: set[int] = set()  # windows of a document have its bytes once
    for i, document in enumerate(tokens.documents):
        share[i] = 0 if document in seen else share[i]
        seen.add(document)
    starts = [[sum(len(tokens.ids[j]) for j in held[:k]) for k in range(len(held))] for held in bins]
    return replace(
        tokens,
        ids=[[t for i in held for t in tokens.ids[i]] for held in bins],
        labels=[[t for i in held for t in tokens.labels[i]] for held in bins],
        starts=starts,
        documents=list(range(len(bins))),
        bytes=[sum(share[i] for i in held) for held in bins],
    )


def collate(tokens: Tokens, rows: Sequence[int] | Tensor, pad: int) -> tuple[dict[str, Tensor], Tensor]:
    """A batch ``(B, T)`` and its labels ``(B, T)``, padded on the right.

    On the right whatever the tokenizer's side is: a causal model's token never sees what comes after it, so
    positions and masks are right in every architecture. Packed rows have ``position_ids`` that start anew
    with each text, and no mask: transformers then lets no text see another.
    """
    which = [int(i) for i in rows]
    width = max(len(tokens.ids[i]) for i in which)

    def padded(values: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (width - len(row)) for row in values], dtype=torch.int64)

    inputs = {"input_ids": padded([tokens.ids[i] for i in which], pad)}
    if tokens.packed:
        positions = torch.empty(len(which), width, dtype=torch.int64)
        for at, i in enumerate(which):
            edges = sorted({*tokens.starts[i], len(tokens.ids[i]), width})
            for first, last in itertools.pairwise(edges):
                positions[at, first:last] = torch.arange(last - first)
        inputs["position_ids"] = positions
    else:
        inputs["attention_mask"] = padded([[1] * len(tokens.ids[i]) for i in which], 0)
    return inputs, padded([tokens.labels[i] for i in which], IGNORED)
