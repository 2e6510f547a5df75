"""What an adapter may offer beyond :class:`kilobayes.types.Adapter`, asked for by name, with its defaults.

========== =====================================================================================
freeze     ``(sites) -> Params``: frozen constants, a function of the adapter's fields and of the
           base's weights alone; keys ``"site/name"``, or ``"*/name"`` for one that all sites share.
drop       ``(params, streams) -> Params``: noise of one training step, leaves to leaves.
penalty    ``(theta, progress) -> (S,)``: added to each member's loss, in nats per row.
project    ``(theta, gradients, memo, progress) -> memo``: after an optimiser step, changes ``theta``
           in place; ``memo`` ``(S, ...)`` is empty at first, and kept in checkpoints.
restrict   ``(draws, around, progress) -> Params``: what draws keep of the weights that they are
           drawn around, both ``(n, ...)``; ``progress`` is None after training.
rates      ``() -> {leaf: factor}``: of the learning rate, by a leaf's name; "head" for trained heads.
count      ``(sites) -> int``: numbers trained.
stored     ``(sites) -> int``: bytes of the packed tensors in float32.
pack       ``(theta, sites) -> tensors``: the compact file, few tensors for all sites.
unpack     ``(tensors, sites) -> Params``: its inverse.
========== =====================================================================================
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kilobayes.random import Streams
from kilobayes.tree import size, split_key
from kilobayes.types import Params, Progress, Site

HEAD = ("weight", "bias")  # leaves of trained heads


def freeze(adapter: Any, sites: list[Site]) -> Params:
    """The adapter's constants; none unless it has some."""
    return adapter.freeze(sites) if hasattr(adapter, "freeze") else {}


def drop(adapter: Any, params: Params, streams: Streams) -> Params:
    """A training step's noise; none unless the adapter has some."""
    return adapter.drop(params, streams) if hasattr(adapter, "drop") else params


def penalty(adapter: Any, theta: Params, progress: Progress) -> Tensor | float:
    """The adapter's own part of each member's loss ``(S,)``, in nats per row."""
    return adapter.penalty(theta, progress) if hasattr(adapter, "penalty") else 0.0


@torch.no_grad()
def project(adapter: Any, theta: Params, gradients: Params, memo: Params, progress: Progress) -> Params:
    """What the adapter does to its weights after an optimiser step, in place; returns the memo to keep."""
    return adapter.project(theta, gradients, memo, progress) if hasattr(adapter, "project") else memo


def restrict(adapter: Any, draws: Params, around: Params, progress: Progress | None = None) -> Params:
    """Draws ``(n, ...)`` as the adapter allows them, member by member around weights ``(K, ...)``."""
    if not hasattr(adapter, "restrict"):
        return draws
    times = size(draws) // size(around)
    near = {k: v.detach().repeat_interleave(times, dim=0) if times > 1 else v for k, v in around.items()}
    return adapter.restrict(draws, near, progress)


def rates(adapter: Any, theta: Params) -> dict[str, float]:
    """Factors of the learning rate by key; 1 where absent."""
    if not hasattr(adapter, "rates"):
        return {}
    factors, found = adapter.rates(), {}
    for key in theta:
        leaf = split_key(key)[1]
        name = "head" if leaf in HEAD else leaf
        if name in factors:
            found[key] = factors[name]
    return found
