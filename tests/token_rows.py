"""Random token rows for a causal model of 61 words, and the task that they are rows of."""

from __future__ import annotations

import torch

from kilobayes.random import generator
from kilobayes.tasks.lm import Language
from kilobayes.tasks.packing import IGNORED, Tokens

from .small_bytes import tokenizer

VOCABULARY = 61


def rows(*lengths: int, seed: int = 0) -> Tokens:
    """Random token rows, two thirds of whose tokens are learned."""
    gen = generator(seed, 11)
    ids, labels = [], []
    for length in lengths:
        line = torch.randint(3, VOCABULARY, (length + 1,), generator=gen)
        keep = torch.rand(length, generator=gen) < 0.67
        keep[-1] = True
        ids.append(line[:-1].tolist())
        labels.append(torch.where(keep, line[1:], IGNORED).tolist())
    count = len(lengths)
    return Tokens(ids, labels, [[0]] * count, list(range(count)), [3 * n for n in lengths])


def task() -> Language:
    return Language(tokenizer(), 32)
