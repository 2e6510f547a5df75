"""What travels: flat dictionaries of tensors in safetensors, all else in JSON; nothing is unpickled."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from kilobayes.errors import KilobayesError
from kilobayes.types import Params

TENSORS = "application/octet-stream"
PREDICTIONS = "predictions"
LOSSES = "losses"
SPARE = 1 << 16  # bytes of a body beside its numbers: names, shapes
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def check_name(user: str) -> str:
    """A user's name, which is a folder's name, too.

    Raises:
        KilobayesError: it is not of 1 to 64 letters, digits, points, dashes and underscores.
    """
    if not NAME.fullmatch(user):
        raise KilobayesError(
            "a user's name has 1 to 64 letters, digits, points, dashes and underscores",
            f"found {user!r:.80}",
            "as in --user anna",
        )
    return user


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of tensors; the same tensors have the same bytes."""
    return save({k: tensors[k].detach().cpu().contiguous() for k in sorted(tensors)})


def unpack(body: bytes) -> Params:
    """Tensors of a body.

    Raises:
        KilobayesError: it is no whole safetensors file, or holds other numbers than floating-point ones.
    """
    try:
        found = load(body)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise KilobayesError("the body holds no tensors", f"{error}"[:200]) from None
    if odd := [k for k, v in found.items() if not v.is_floating_point()]:
        raise KilobayesError(f"{odd[0]!r:.80} is {found[odd[0]].dtype}", "floating-point numbers are taken")
    return found


def pack_update(theta: Params, predictions: Tensor | None) -> bytes:
    """One user's update ``(1, ...)``, with its log-probabilities ``(1, N, C)`` of the reference rows."""
    extra = {} if predictions is None else {PREDICTIONS: predictions}
    return pack({f"theta|{k}": v for k, v in theta.items()} | extra)


def unpack_update(body: bytes) -> tuple[Params, Tensor | None]:
    """As :func:`pack_update`.

    Raises:
        KilobayesError: as :func:`unpack`, or tensors that are neither.
    """
    found = unpack(body)
    predictions = found.pop(PREDICTIONS, None)
    if odd := [k for k, v in found.items() if not k.startswith("theta|") or v.dtype != torch.float32]:
        raise KilobayesError(f"{odd[0]!r:.80} is no float32 leaf of an update", f"{found[odd[0]].dtype}")
    return {k.removeprefix("theta|"): v for k, v in found.items()}, predictions


def pack_everyone(names: Sequence[str], theta: Params) -> bytes:
    """Updates ``(V, ...)`` of users, each under its name."""
    return pack({f"{name}|{k}": v[i : i + 1] for i, name in enumerate(names) for k, v in theta.items()})


def unpack_everyone(body: bytes, names: Sequence[str]) -> Params:
    """Updates ``(V, ...)`` in the order of names.

    Raises:
        KilobayesError: as :func:`unpack`, or updates of others, or of other shapes, than they say.
    """
    found = unpack(body)
    keys = [k.partition("|")[2] for k in found if k.startswith(f"{names[0]}|")]
    if len(keys) * len(names) != len(found):
        raise KilobayesError("the server's body holds other updates than it says")
    try:
        return {k: torch.cat([found[f"{name}|{k}"] for name in names]) for k in keys}
    except (KeyError, RuntimeError) as error:
        raise KilobayesError("the server's body holds other updates than it says", str(error)[:200]) from None


def read_json(body: bytes) -> dict[str, Any]:
    """An object.

    Raises:
        KilobayesError: the body is none.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise KilobayesError("the body is no JSON object")
    return found
