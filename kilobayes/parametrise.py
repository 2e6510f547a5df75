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
from kilobayes.tree import numbers, size, split_key
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


def stored(adapter: Any, sites: list[Site], theta: Params) -> int:
    """Bytes of the packed tensors of one member in float32: the adapter's formula, or 4 a number."""
    if hasattr(adapter, "stored"):
        return int(adapter.stored(sites))
    return 4 * numbers(theta)


def pack(adapter: Any, theta: Params, sites: list[Site]) -> dict[str, Tensor]:
    """A stack's adapter leaves as few tensors ``(S, ...)``; by default all sites' leaves of a name in one."""
    if hasattr(adapter, "pack"):
        return adapter.pack(theta, sites)  # type: ignore[no-any-return]
    found: dict[str, list[Tensor]] = {}
    for key in _in_order(theta, sites):
        found.setdefault(split_key(key)[1], []).append(theta[key].flatten(1))
    return {name: torch.cat(parts, dim=1) for name, parts in found.items()}


def unpack(adapter: Any, tensors: dict[str, Tensor], sites: list[Site], like: Params) -> Params:
    """The inverse of :func:`pack`, for leaves of the shapes of ``like``.

    Raises:
        KeyError: a tensor is missing.
        RuntimeError: one has another size.
    """
    if hasattr(adapter, "unpack"):
        return adapter.unpack(tensors, sites)  # type: ignore[no-any-return]
    keys = _in_order(like, sites)
    out: Params = {}
    for name in {split_key(key)[1]: None for key in keys}:
        own = [key for key in keys if split_key(key)[1] == name]
        parts = tensors[name].split([like[key][0].numel() for key in own], dim=1)
        out |= {k: v.reshape(-1, *like[k].shape[1:]).clone() for k, v in zip(own, parts, strict=True)}
    return out


def _in_order(theta: Params, sites: list[Site]) -> list[str]:
    """Keys of adapter leaves: shared ones first, then the sites in their order."""
    place = {"*": -1} | {site.name: index for index, site in enumerate(sites)}
    return sorted(theta, key=lambda key: (place[split_key(key)[0]], split_key(key)[1]))
