"""How rows meet members: block s of the rows goes to member s."""

from __future__ import annotations

import torch
from torch import Tensor

from kilobayes.errors import KilobayesError
from kilobayes.host.tokens import Masked
from kilobayes.types import LowRank, Operator, map_tensors


def blocks(x: Tensor, stack: int) -> Tensor:
    """Rows ``(S N, ...)`` to ``(S, N, ...)``.

    Raises:
        KilobayesError: the rows do not divide by the stack.
    """
    if x.shape[0] % stack:
        raise KilobayesError(
            f"a stack of {stack} members needs a multiple of {stack} rows: block s goes to member s",
            f"{x.shape[0]} rows",
            "`with host.outer(model, stack):` shows every row to every member",
        )
    return x.reshape(stack, x.shape[0] // stack, *x.shape[1:])


def members(operator: Operator) -> int:
    """S of an operator: the leading axis of its tensors."""
    return next(v.shape[0] for v in vars(operator).values() if isinstance(v, Tensor))


def add(y: Tensor, x: Tensor, operator: Operator) -> Tensor:
    """Base output plus the update, block s of the rows through member s; y's dtype is kept."""
    if isinstance(operator, Masked):
        x, operator = operator.mask(x), operator.operator
    some = next(v for v in vars(operator).values() if isinstance(v, Tensor))
    rows = blocks(x, members(operator)).flatten(1, -2)
    if (
        some.dtype != rows.dtype
    ):  # fp32 factors on a half-precision base: half-precision products, fp32 gradients
        operator = map_tensors(operator, lambda t: _as(t, rows.dtype))
    if (
        isinstance(operator, LowRank)
        and y.dtype == rows.dtype
        and not torch.is_autocast_enabled(x.device.type)
    ):
        flat = y.reshape(len(rows), -1, y.shape[-1])
        out = torch.baddbmm(flat, torch.bmm(rows, operator.A.mT), operator.B.mT)
        return out.reshape(y.shape)
    return y + operator(rows).reshape(y.shape).to(y.dtype)


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A factor in another precision; one that all members share stays a single copy."""
    if not t.is_floating_point():
        return t
    return t[:1].to(dtype).expand_as(t) if t.stride(0) == 0 else t.to(dtype)
