"""Matrices whose rows have few numbers other than zero: which to keep, and how to write them down."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SMALL = 2**16  # positions within widths up to it have two bytes


def largest(score: Tensor, count: int) -> Tensor:
    """Where the ``count`` largest numbers of the last axis are, exactly so many even among equals."""
    if count >= score.shape[-1]:
        return torch.ones_like(score, dtype=torch.bool)
    best = score.topk(count, dim=-1, sorted=False).indices
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, best, True)


def kind(width: int) -> tuple[str, torch.dtype]:
    """Name and type of the positions in rows of a width."""
    return ("positions", torch.uint16) if width <= SMALL else ("wide", torch.int32)


def pack(matrices: Sequence[Tensor], counts: Sequence[int]) -> dict[str, Tensor]:
    """``values`` ``(S, n)`` of matrices ``(S, rows, width)``, row by row, and their ``positions`` in the row.

    Positions in matrices wider than 65,536 are apart, in ``wide``. A row of matrix i has ``counts[i]``
    values, zeros among them if it has fewer others. If some row has more, ``rows`` ``(all rows,)`` says how
    many each has: those of the member that has most.
    """
    there = [(m != 0) | torch.signbit(m) for m in matrices]  # -0.0 comes back as it was
    most = [t.sum(dim=-1).amax(dim=0) for t in there]
    plain = all(bool((n <= count).all()) for n, count in zip(most, counts, strict=True))
    packed: dict[str, list[Tensor]] = {"values": []}
    for matrix, mask, row, count in zip(matrices, there, most, counts, strict=True):
        held = torch.full_like(row, count) if plain else row
        order = (~mask).byte().argsort(dim=-1, stable=True)
        taken = torch.arange(matrix.shape[-1], device=order.device) < held[:, None]
        name, dtype = kind(matrix.shape[-1])
        packed["values"].append(matrix.gather(-1, order)[:, taken])
        packed.setdefault(name, []).append(order[:, taken].to(dtype))
    joined = {name: torch.cat(parts, dim=1) for name, parts in packed.items()}
    return joined if plain else joined | {"rows": torch.cat(most).int()}


def unpack(
    packed: dict[str, Tensor], shapes: Sequence[tuple[int, int]], counts: Sequence[int]
) -> list[Tensor]:
    """The matrices ``(S, rows, width)`` of :func:`pack`, bit for bit, from rows and width of each.

    Raises:
        ValueError: there are more or fewer numbers than these shapes have.
    """
    values = packed["values"]
    rows = torch.tensor([count for shape, count in zip(shapes, counts, strict=True) for _ in range(shape[0])])
    each = iter(packed.get("rows", rows).to(values.device).long().split([shape[0] for shape in shapes]))
    at = dict.fromkeys(packed, 0)
    found = []
    for height, width in shapes:
        held, name = next(each), kind(width)[0]
        stop = {part: at[part] + int(held.sum()) for part in ("values", name)}
        numbers, positions = (packed[part][:, at[part] : stop[part]] for part in ("values", name))
        at |= stop
        row = torch.arange(height, device=values.device).repeat_interleave(held)
        flat = values.new_zeros(len(values), height * width)
        found.append(flat.scatter_(1, row * width + positions.long(), numbers).unflatten(1, (height, width)))
    if at["values"] != values.shape[1]:
        raise ValueError(f"there are {values.shape[1]} values for rows that have {at['values']}")
    return found
