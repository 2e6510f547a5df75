"""Randomness as an argument: one independent stream per member of a stack."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def generator(*seed: int) -> torch.Generator:
    """A CPU generator from several integers, mixed so that (1, 2) and (2, 1) differ."""
    mixed = 0x9E3779B97F4A7C15
    for part in seed:
        mixed = ((mixed ^ (part & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return torch.Generator().manual_seed(mixed & 0x7FFFFFFFFFFFFFFF)


class Streams:
    """One generator per member, so that a stack draws what its members would draw alone.

    Numbers are drawn on the CPU and moved, so they do not depend on the device. A tensor ``(S m, ...)``
    holds m entries of each member, member by member, and each member's generator draws its m.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.generators = list(generators)

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers of the shape ``(S, ...)``, dtype and device of ``like``."""
        return torch.cat([torch.randn(self._part(like), generator=g) for g in self.generators]).to(like)

    def keep(self, like: Tensor, probability: float) -> Tensor:
        """Ones with the given probability, else zeros, in the shape ``(S, ...)`` of ``like``."""
        drawn = [torch.rand(self._part(like), generator=g) < probability for g in self.generators]
        return torch.cat(drawn).to(like)

    def _part(self, like: Tensor) -> tuple[int, ...]:
        return len(like) // len(self.generators), *like.shape[1:]

    def state(self) -> Tensor:
        """All generators' states ``(S, bytes)``, to resume from."""
        return torch.stack([g.get_state() for g in self.generators])

    def restore(self, state: Tensor) -> None:
        for g, row in zip(self.generators, state, strict=True):
            g.set_state(row.clone())  # a view into a larger tensor crashes torch 2.13


class DefaultStream(Streams):
    """torch's default generator as a stream, for training loops other than ours.

    There an adapter's noise obeys ``torch.manual_seed`` and is replayed under gradient checkpointing, as a
    Trainer's users expect of every dropout layer.
    """

    def __init__(self) -> None:
        super().__init__([])

    def normal(self, like: Tensor) -> Tensor:
        return torch.randn_like(like)

    def keep(self, like: Tensor, probability: float) -> Tensor:
        return torch.bernoulli(torch.full_like(like, probability))
