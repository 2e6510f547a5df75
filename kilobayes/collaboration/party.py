"""Users of one process, trained as one stack: all of them in a simulation, one of them in a client.

The same code and, up to the rounding of products of another shape, the same result: a user's rows, noise and
start come from the shared seed and the user's own name. Where training stands is a checkpoint on disk, so a
process that is killed at any point goes on to the same result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from kilobayes.collaboration.settings import Together
from kilobayes.options import Options
from kilobayes.types import Params


class Party:
    """Users who are trained in one forward on one hosted model.

    Attributes:
        names: the users.
        rows: numbers of their training rows.
        model: hosts the adapter, for :mod:`kilobayes.collaboration.rounds`.
    """

    names: tuple[str, ...]
    rows: list[int]
    model: Any

    @property
    def step(self) -> int:
        """Optimiser steps done, of those that a checkpoint holds."""
        raise NotImplementedError

    @property
    def adopted(self) -> int:
        """The last step at which leaves were adopted; 0 before the first. Equal to :attr:`step` when a round is over."""
        raise NotImplementedError

    def train(self, until: int) -> Params:
        """Go on to step ``until`` and return the users' updates ``(U, ...)``; at once where it is reached."""
        raise NotImplementedError

    def adopt(self, theta: Params) -> None:
        """Replace the leaves ``(U, ...)``; optimiser moments, schedule and place in the data stay."""
        raise NotImplementedError

    def predictions(self) -> Tensor:
        """Log-probabilities ``(U, N, C)`` on the shared reference rows (language: at token positions)."""
        raise NotImplementedError

    def losses(self, theirs: Params) -> Tensor:
        """``(U, V)``: nats per row, or token, of everyone's updates ``(V, ...)`` on one's own trust rows."""
        raise NotImplementedError

    def test(self) -> list[dict[str, float]]:
        """Figures of each user on its own test rows."""
        raise NotImplementedError

    def save(self, folders: Sequence[Path]) -> None:
        """Each user as a run that ``kilobayes predict``, ``evaluate`` and ``generate`` load."""
        raise NotImplementedError


def gather(
    options: Options,
    together: Together,
    users: Mapping[str, Any],
    folder: Path,
    classes: Sequence[str] | None = None,
) -> Party:
    """Users with their data, ready to train.

    Args:
        users: data by user, each as ``kilobayes train --data`` takes it, or in memory.
        folder: where checkpoints are kept; one that is there is gone on with.
        classes: of all users together, which one user alone cannot know; None for those of ``users``.

    Raises:
        KilobayesError: as reading data; other settings than those of the checkpoint.
    """
    raise NotImplementedError
