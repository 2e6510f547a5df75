r"""The Gauss-Newton matrix as its eigenvectors and eigenvalues: all that Laplace's approximation asks of it.

``F = U diag(e) U^T`` with orthonormal columns U, so that for any precision lambda of the prior

.. math:: (F + \lambda I)^{-1} = U (e + \lambda)^{-1} U^\top + \lambda^{-1} (I - U U^\top), \qquad
          \log\lvert I + F/\lambda\rvert = \sum_j \log(1 + e_j/\lambda)

and both cost nothing once F is there. How it is found: :mod:`kilobayes.posteriors.gauss_newton`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kilobayes.tree import map_params
from kilobayes.types import Params


@dataclass(frozen=True, eq=False)
class Curvature:
    """U and e in blocks: one for each leaf, or ``"*"`` for all of them in one.

    Attributes:
        left: U_L ``(m, a)``; absent for the identity.
        right: U_R ``(n, b)``; absent for the identity.
        values: e ``(a, b)``. Where a side has one value more than it has vectors, the last is the eigenvalue
            of everything orthogonal to them.
    """

    left: Params
    right: Params
    values: Params

    def parts(self) -> tuple[Params, Params, Params]:
        return self.left, self.right, self.values

    def to(self, device: torch.device) -> Curvature:
        return Curvature(*(map_params(lambda v: v.to(device), part) for part in self.parts()))

    def blocks(self, leaves: Params) -> Params:
        """Leaves ``(B, R, ...)`` by block, ``(B, R, m, n)``."""
        return joint(leaves) if "*" in self.values else matrices(leaves)

    def pieces(self, key: str, block: Tensor) -> list[Piece]:
        """A block taken apart into what F treats alike."""
        left, right, values = self.left.get(key), self.right.get(key), self.values[key]
        return [
            Piece(
                y.mT, values[rows][:, columns], left if rows.stop else None, right if columns.stop else None
            )
            for x, columns in halves(block, right, values.shape[1])
            for y, rows in halves(x.mT, left, values.shape[0])
        ]

    def root(self, noise: Params, precision: float) -> Params:
        """Standard normal blocks to draws from N(0, (F + precision I)^-1)."""
        out: Params = {}
        for key, block in noise.items():
            for piece in self.pieces(key, block):
                x = piece.x / (piece.values + precision).sqrt()
                x = x if piece.left is None else piece.left @ x
                x = x if piece.right is None else x @ piece.right.mT
                out[key] = out[key] + x if key in out else x
        return out

    def covariances(self, leaves: Params, precisions: Tensor) -> Tensor:
        """J (F + precision I)^-1 J^T ``(G, B, R, R)`` of derivatives ``(B, R, ...)``, for G precisions.

        A sum of squares, so nothing cancels.
        """
        total: Tensor | float = 0.0
        columns, values = [], []
        for key, block in self.blocks(leaves).items():
            for piece in self.pieces(key, block):
                x, e = piece.x, piece.values
                if e.shape == x.shape[2:]:
                    columns.append(x.flatten(2))
                    values.append(e.flatten())
                    continue
                if e.shape[1] > 1:  # one value for all rows
                    x, e = x.mT, e.mT
                x = x.transpose(1, 2)
                grams = (x @ x.mT).double()  # (B, m or a, R, R)
                weights = 1.0 / (e[:, 0].double() + precisions.to(e.device).double()[:, None])
                total = total + torch.einsum("bars,ga->gbrs", grams, weights.expand(-1, grams.shape[1]))
        if columns:
            flat, e = torch.cat(columns, dim=2), torch.cat(values)
            total = total + torch.stack([(flat / (e + p)) @ flat.mT for p in precisions.to(e)]).double()
        return torch.as_tensor(total)

    def log_determinant(self, precision: float) -> float:
        """log|I + F / precision|."""
        total = 0.0
        for key, values in self.values.items():
            logs = torch.log1p(values.double() / precision)
            for basis, sums in ((self.right.get(key), logs), (self.left.get(key), logs.mT)):
                if basis is not None and sums.shape[1] > basis.shape[1]:
                    sums[:, -1] *= basis.shape[0] - basis.shape[1]  # as many as it stands for
            total += float(logs.sum())
        return total


@dataclass(frozen=True, eq=False)
class Piece:
    """Coordinates x ``(B, R, p, q)``, their eigenvalues, with a one for an axis that shares them, and the way
    back."""

    x: Tensor
    values: Tensor
    left: Tensor | None
    right: Tensor | None


def halves(x: Tensor, basis: Tensor | None, count: int) -> list[tuple[Tensor, slice]]:
    """x along a basis (last axis) and, if there are more values than vectors, what is orthogonal to it."""
    if basis is None:
        return [(x, slice(None))]
    along, width = x @ basis, basis.shape[1]
    out = [(along, slice(0, width))]
    return [*out, (x - along @ basis.mT, slice(width, None))] if count > width else out


def matrices(leaves: Params) -> Params:
    """Leaves ``(B, R, ...)`` as ``(B, R, m, n)``: vectors and numbers have m = 1."""
    return {k: v.flatten(3) if v.dim() > 3 else v.flatten(2)[:, :, None] for k, v in leaves.items()}


def joint(leaves: Params) -> Params:
    """All leaves ``(B, R, ...)`` in one block ``(B, R, 1, P)``."""
    return {"*": torch.cat([v.flatten(2) for _, v in sorted(leaves.items())], dim=2)[:, :, None]}


def curvature_of(state: Any, k: int) -> Curvature:
    """The curvature of one member of a state that has ``left``, ``right`` and ``values`` ``(K, ...)``."""
    return Curvature(*(map_params(lambda v: v[k], p) for p in (state.left, state.right, state.values)))
