"""Members of a stack trained some at a time: memory for few, the result of all.

A member takes the steps that it would take alone, so it does not matter beside whom it takes them; only the
rounding of products of another shape differs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kilobayes import train, tree
from kilobayes.checkpoint import Checkpoint
from kilobayes.protocols import Energy
from kilobayes.step import Nll, TrainData
from kilobayes.types import Params, Posterior, Progress


def fit(
    model: nn.Module,
    data: TrainData,
    nll: Nll,
    posterior: Posterior,
    start: Callable[[list[int]], Params],
    settings: train.Settings,
    at_once: int = 0,
    *,
    energy: Energy | None = None,
    save: Checkpoint | None = None,
    watch: Callable[[Progress, Tensor], None] | None = None,
) -> train.Trained:
    """As :func:`kilobayes.train.fit`, but ``at_once`` members at a time.

    Each chunk has a checkpoint of its own beside that of the first, and keeps it when it is done, so a run
    that is killed goes on in the chunk where it was. The time limit is shared out evenly over chunks.

    Args:
        start: initial leaves of the members with these seeds.
        at_once: members trained together; 0 for all of them.

    Raises:
        KilobayesError: every member of every chunk diverged, or as :func:`kilobayes.train.fit`.
    """
    members, began = len(settings.seeds), time.monotonic()
    size = at_once or members
    parts = [slice(first, min(first + size, members)) for first in range(0, members, size)]
    done: list[train.Trained | None] = []
    lost: train.Diverged | None = None
    for number, part in enumerate(parts):
        own = replace(settings, seeds=settings.seeds[part])
        if isinstance(settings.lr, tuple):
            own = replace(own, lr=settings.lr[part])
        if settings.max_seconds:
            left = settings.max_seconds - (time.monotonic() - began)
            own = replace(own, max_seconds=max(left, 1e-3) / (len(parts) - number))
        ours = save if save is None or len(parts) == 1 else _part_of(save, part)
        try:
            begin = start(list(own.seeds))
            done.append(
                train.fit(model, data, nll, posterior, begin, own, energy=energy, save=ours, watch=watch)
            )
        except train.Diverged as error:
            done.append(None)
            lost = error
    return _joined(done, parts, lost)


def _part_of(save: Checkpoint, part: slice) -> Checkpoint:
    """The checkpoint of a chunk: the first has the file that is looked for, the others are beside it."""
    path = save.path.with_stem(f"{save.path.stem}-{part.start}") if part.start else save.path
    identity: dict[str, Any] = save.identity | {"members": [part.start, part.stop]}
    return replace(save, path=path, identity=identity, last=time.monotonic())


def _joined(
    done: Sequence[train.Trained | None], parts: Sequence[slice], lost: train.Diverged | None
) -> train.Trained:
    """All members as one stack; one whose whole chunk diverged has no losses, and another's state.

    Chunks that the clock stopped at different steps are as long as the shortest.
    """
    kept = [found for found in done if found is not None]
    if not kept:
        assert lost is not None
        raise lost
    steps = min(len(found.losses) for found in kept)
    states, losses = [], []
    diverged: list[int] = []
    for part, found in zip(parts, done, strict=True):
        count = part.stop - part.start
        if found is None:
            states.append(tree.state_member(kept[0].state, torch.zeros(count, dtype=torch.long)))
            losses.append(torch.full((steps, count), float("nan")))
            diverged += range(part.start, part.stop)
        else:
            states.append(found.state)
            losses.append(found.losses[:steps])
            diverged += [part.start + member for member in found.diverged]
    stopped = next((found.stopped for found in kept if found.stopped), "")
    return train.Trained(tree.concatenate_states(states), torch.cat(losses, dim=1), diverged, stopped)
