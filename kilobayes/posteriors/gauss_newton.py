r"""The generalised Gauss-Newton matrix of the log-likelihood, exact row by row, in three structures.

Of row i, with scores f_i, their derivatives J_i and the Hessian of the negative log-likelihood with respect
to the scores, H_i = V_i V_i^T with C - 1 columns (a constant added to all scores changes nothing):

.. math:: F = \sum_i J_i^\top H_i J_i = \sum_i G_i^\top G_i, \qquad G_i = V_i^\top J_i

In three structures, each kept by its eigenvectors (:mod:`kilobayes.posteriors.curvature`):

* ``full``: the eigenvectors of F itself.
* ``diag``: U = I.
* ``kron``: for a leaf that is a matrix, per-row derivatives G ``(m, n)``, the Kronecker product of :math:`L =
  \sum G G^\top` and :math:`R = \sum G^\top G / \operatorname{tr} L`. That is one step of the power iteration
  towards the product nearest to F (Morwani et al., arXiv:2406.17748), from the identity; it is exact for one
  row whose G has rank one. U = U_L (x) U_R.

KFAC multiplies the second moments of a layer's inputs and of its outputs' derivatives, over all tokens: it
takes the tokens of a row for independent, needs to know the layer, and counts padding unless told not to.
Derivatives of rows need none of that: any adapter, any leaf, and nothing about sequences can enter.

A side of more than 64 is kept as its ``rank`` leading eigenvectors (rank 10: 160 kB for a width of 4096,
where the whole matrix has 67 MB), updated batch by batch: the ones so far, scaled by their singular values,
and the new rows are cut back to rank by a randomised SVD. What is lost counts with its mean: the eigenvalue
of everything orthogonal is the rest of the trace over the rest of the dimensions, where the paper has zero,
and so the prior's whole width. If nothing is lost, the order of rows does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kilobayes.posteriors.curvature import Curvature, joint, matrices
from kilobayes.protocols import Jacobian
from kilobayes.types import Params

WHOLE = 64  # a side up to this is kept whole
LARGEST = 4096  # numbers that a full matrix may be over
OVERSAMPLED = 10  # columns beyond the rank in a randomised SVD


def gauss_newton(
    structure: str, stream: Iterator[Jacobian], rows: int, rank: int, gen: torch.Generator
) -> Curvature:
    """F of a stream of ``rows`` rows' derivatives G: ``"kron"``, ``"diag"`` or ``"full"``."""
    if structure == "diag":
        return diagonal(stream)
    return full(stream, rows) if structure == "full" else kronecker(stream, rank, gen)


def diagonal(stream: Iterator[Jacobian]) -> Curvature:
    """The diagonal of F."""
    values: Params = {}
    for batch in stream:
        for key, block in matrices(batch.gradients).items():
            values[key] = values.get(key, torch.zeros(())) + block.square().sum(dim=(0, 1))
    return Curvature({}, {}, values)


def full(stream: Iterator[Jacobian], rows: int) -> Curvature:
    """F itself, by the eigenvectors of its range: as many as it has rows or columns, whichever is less.

    Args:
        rows: how many rows the stream has in all.
    """
    kept: list[Tensor] = []
    gram: Tensor | float = 0.0
    for batch in stream:
        blocks = joint(batch.gradients)["*"].double()
        block = blocks.flatten(0, 2)
        if rows * blocks.shape[1] <= block.shape[1]:
            kept.append(block)
        else:
            gram = gram + block.mT @ block
    if kept:
        basis, triangle = torch.linalg.qr(torch.cat(kept).mT)
        turn, singular, _ = torch.linalg.svd(triangle)
        vectors, values = basis @ turn, singular.square()
    else:
        values, vectors = torch.linalg.eigh(torch.as_tensor(gram))
    if vectors.shape[1] < len(vectors):
        values = torch.cat([values, torch.zeros_like(values[:1])])
    return Curvature({}, {"*": vectors.float()}, {"*": values.clamp(min=0.0).float()[None]})


def kronecker(stream: Iterator[Jacobian], rank: int, gen: torch.Generator) -> Curvature:
    """One Kronecker product for each leaf, a side of more than 64 by its ``rank`` leading eigenvectors."""
    sides: dict[str, tuple[Side, Side]] = {}
    for batch in stream:
        for key, block in sorted(matrices(batch.gradients).items()):
            m, n = block.shape[2:]
            if key not in sides:
                sides[key] = (Side.empty(m, rank), Side.empty(n, rank))
            left, right = sides[key]
            sides[key] = (left.add(block.mT.reshape(-1, m), gen), right.add(block.reshape(-1, n), gen))
    found = {key: (left.eigen(), right.eigen()) for key, (left, right) in sides.items()}
    return Curvature(
        {key: left[0] for key, (left, _) in found.items() if left[0].numel() > 1},
        {key: right[0] for key, (_, right) in found.items() if right[0].numel() > 1},
        {
            key: left[1][:, None] * right[1] / sides[key][0].trace.clamp(min=1e-30)
            for key, (left, right) in found.items()
        },
    )


@dataclass(frozen=True, eq=False)
class Side:
    """Sums of x x^T over rows x ``(d,)``: whole, or by leading eigenvectors times singular values.

    Attributes:
        trace: of the sum, whatever is kept of it.
        kept: ``(d, d)`` symmetric, or ``(rank, d)``.
        rank: 0 if it is whole.
    """

    trace: Tensor
    kept: Tensor
    rank: int

    @classmethod
    def empty(cls, width: int, rank: int) -> Side:
        whole = width <= max(WHOLE, rank)
        return cls(torch.zeros(()), torch.zeros(width if whole else 0, width), 0 if whole else rank)

    def add(self, rows: Tensor, gen: torch.Generator) -> Side:
        """With rows ``(b, d)`` more; numbers are drawn on the CPU."""
        kept, trace = self.kept.to(rows), self.trace.to(rows) + rows.square().sum()
        if not self.rank:
            return Side(trace, kept + rows.mT @ rows, 0)
        held = torch.cat([kept, rows])
        basis = torch.randn(held.shape[1], min(self.rank + OVERSAMPLED, held.shape[1]), generator=gen)
        basis = basis.to(held)
        for _ in range(2):
            basis = torch.linalg.qr(held.mT @ (held @ basis))[0]
        _, singular, turn = torch.linalg.svd(torch.linalg.qr(held @ basis)[1], full_matrices=False)
        return Side(trace, singular[: self.rank, None] * (turn @ basis.mT)[: self.rank], self.rank)

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Orthonormal eigenvectors ``(d, k)``; eigenvalues, then the mean of those left out, if any."""
        if not self.rank:
            values, vectors = torch.linalg.eigh(self.kept.double())
            return vectors.float(), values.clamp(min=0.0).float()
        basis, triangle = torch.linalg.qr(self.kept.mT.double())
        turn, singular, _ = torch.linalg.svd(triangle)
        values = singular.square()
        mean = (self.trace.double() - values.sum()).clamp(min=0.0) / max(len(basis) - len(values), 1)
        return (basis @ turn).float(), torch.cat([values, mean[None]]).float()
