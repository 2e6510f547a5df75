"""What a paused stack's checkpoint says of its users: pure functions of its tensors.

Names are those of :meth:`kilobayes.checkpoint.Checkpoint.read`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kilobayes import tree
from kilobayes.collaboration.rounds import MEAN, VARIANCE
from kilobayes.posteriors import ask
from kilobayes.posteriors.point import PointState
from kilobayes.types import Params, Posterior

Tensors = dict[str, Tensor]


def leaves(at: Tensors) -> Params:
    """The adapter's leaves in training ``(U, ...)``."""
    return tree.plain(_part(at, "theta|"))


def state(at: Tensors, posterior: Posterior) -> Any:
    """The posterior's state of all users; a point is where the leaves are now."""
    return _with_point(tree.unflatten_state(posterior, _part(at, "state|")), leaves(at))


def update(at: Tensors, posterior: Posterior, share: str) -> Params:
    """What users send ``(U, ...)``: their leaves and, with ``share`` "moments", those of SWAG.

    Before SWAG has seen anything, the leaves are its mean, and its variance is zero.
    """
    theta = leaves(at)
    if share == "mean":
        return theta
    inner = _innermost(state(at, posterior))
    seen = float(inner.count[0])
    for key, value in leaves(at).items():
        mean, variance = inner.average[key], inner.squares[key] / max(seen, 1.0)
        theta[f"{key}{MEAN}"] = mean.float() if seen else value
        theta[f"{key}{VARIANCE}"] = variance.float().clamp(min=0) if seen else torch.zeros_like(value)
    return theta


def replaced(at: Tensors, posterior: Posterior, theta: Params, share: str) -> Tensors:
    """The tensors that change when users adopt an update ``(U, ...)``."""
    changed = {f"theta|{key}": value.to(at[f"theta|{key}"]) for key, value in tree.plain(theta).items()}
    prefix = "state|" + "inner|" * (len(list(ask.chain(posterior))) - 1)
    if share == "mean" or not float(at[f"{prefix}count"][0]):
        return changed
    for key in tree.plain(theta):
        average, squares = f"{prefix}average|{key}", f"{prefix}squares|{key}"
        changed[average] = theta[f"{key}{MEAN}"].to(at[average])
        changed[squares] = (theta[f"{key}{VARIANCE}"] * at[f"{prefix}count"][0]).to(at[squares])
    return changed


def _innermost(found: Any) -> Any:
    return _innermost(found.inner) if hasattr(found, "inner") else found


def _with_point(found: Any, theta: Params) -> Any:
    if isinstance(found, PointState):
        return replace(found, theta=theta)
    return replace(found, inner=_with_point(found.inner, theta)) if hasattr(found, "inner") else found


def _part(at: Tensors, prefix: str) -> Params:
    return {k[len(prefix) :]: v for k, v in at.items() if k.startswith(prefix)}
