r"""Low-rank updates apart from how they are factored: canonical factors, products, and averages.

:math:`B A = (B R^{-1}) (R A)` for every invertible R: the factors are not unique, the update is. So the mean
of factors is the mean of nothing: rotating one user's factors, which changes none of its predictions, moved
the update of the plain factor-wise average by 89% (by 4e-7 after :func:`canonical`). Yet two canonical
factorisations of different updates are still not averaged by averaging their factors, :math:`\overline{B A}
\neq \bar B \bar A`; :func:`average` therefore sums the updates themselves,

.. math:: \sum_u w_{vu} B_u A_u = [w_{v1} B_1, \ldots, w_{vU} B_U]\,[A_1; \ldots; A_U],

which has rank at most U r, and cuts that to a wanted rank by its leading singular vectors, the best there is
(Eckart and Young, 1936). No matrix of the size of a weight is ever formed: two QR decompositions of thin
matrices and the singular values of their small product do. Computed in double precision.

Shapes as in :class:`~kilobayes.types.LowRank`: A ``(S, r, d_in)``, B ``(S, d_out, r)``, any scale in B.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kilobayes.errors import KilobayesError

HOW = ("updates", "canonical", "factors")
LARGEST_CONDITION = 1e4  # of one's own A, whose inverse B' holds


@dataclass(frozen=True, eq=False)
class Averaged:
    """Mixed updates.

    Attributes:
        A, B: ``(V, rank, d_in)``, ``(V, d_out, rank)``.
        lost: ``(V,)`` distance to the exact mixture over its norm, both in Frobenius' norm; 0 where the
            mixture is zero.
    """

    A: Tensor
    B: Tensor
    lost: Tensor


@torch.no_grad()
def canonical(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    r"""The same update in factors that depend on the update alone.

    With the singular value decomposition :math:`B A = U \Sigma V^\top`: :math:`B' = U \Sigma^{1/2}`,
    :math:`A' = \Sigma^{1/2} V^\top`, values from the largest down, so that :math:`B'^\top B' = A' A'^\top =
    \Sigma`. The entry of largest magnitude in each column of U is positive. Equal singular values leave their
    vectors open.

    Returns:
        Factors of the shapes and the dtype of those given; ranks beyond the sides of the weight are zero.
    """
    u, values, v = _svd(A, B)
    a, b = _factors(u, values, v, A.shape[1])
    return a.to(A), b.to(B)


@torch.no_grad()
def truncate(A: Tensor, B: Tensor, rank: int) -> Averaged:
    """The best updates of at most this rank, in canonical factors, and the share of the norm that is lost.

    Raises:
        KilobayesError: a rank below 1.
    """
    _check_rank(rank)
    u, values, v = _svd(A, B)
    a, b = _factors(u, values, v, rank)
    return Averaged(a.to(A), b.to(B), _share(values[:, rank:].norm(dim=1), values.norm(dim=1)))


@torch.no_grad()
def average(
    A: Tensor, B: Tensor, weights: Tensor, *, rank: int | None = None, how: str = "updates"
) -> Averaged:
    """Users' updates, mixed: row v of the weights gives update v.

    Args:
        A, B: factors of U users.
        weights: ``(V, U)``, such as a matrix of trust; any real numbers.
        rank: of what comes back; None for U r, at most the smaller side of the weight, which loses nothing.
            Taken for ``how="updates"`` alone: the others keep r.
        how: "updates" for the best of a rank, "factors" for the means of A and of B, each apart, as published
            code has it (arXiv:2404.09753), "canonical" for the same of canonical factors.

    Raises:
        KilobayesError: another ``how``, weights of another shape, or a rank below 1.
    """
    users, r = A.shape[:2]
    if how not in HOW:
        raise KilobayesError(f"cannot average by {how!r}", f"known: {', '.join(HOW)}")
    if weights.dim() != 2 or weights.shape[1] != users:
        raise KilobayesError(
            f"{users} users need a column of weights each", f"found the shape {tuple(weights.shape)}"
        )
    w = weights.double().to(A.device)
    if how != "updates":
        a, b = (A.double(), B.double()) if how == "factors" else canonical(A.double(), B.double())
        a, b = torch.einsum("vu,urd->vrd", w, a), torch.einsum("vu,uor->vor", w, b)
        whole_a, whole_b = concatenated(A.double(), B.double(), w)
        apart = norm(torch.cat([whole_a, a], dim=1), torch.cat([whole_b, -b], dim=2))
        return Averaged(a.to(A), b.to(B), _share(apart, norm(whole_a, whole_b)))
    rank = min(users * r, A.shape[2], B.shape[1]) if rank is None else rank
    _check_rank(rank)
    left, right = _thin(*_side_by_side(A.double(), B.double()))
    middle = (left.r * w.repeat_interleave(r, dim=1)[:, None]) @ right.r.mT  # (V, k, l)
    u, values, vt = torch.linalg.svd(middle, full_matrices=False)
    a, b = _factors(left.q @ u, values, right.q @ vt.mT, rank)
    return Averaged(a.to(A), b.to(B), _share(values[:, rank:].norm(dim=1), values.norm(dim=1)))


@torch.no_grad()
def towards(A: Tensor, B: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    r"""The same update in factors whose A is one's own A ``(S, r, d_in)``, turned to where the update reads.

    With Q an orthonormal basis of the row space of A, filled up by that of one's own A where the update has
    a lower rank, and the polar decompositions :math:`A_{own} = P O` and :math:`O Q = W H`,

    .. math:: A' = P W Q^\top, \qquad B' = B A Q W^\top P^{-1}.

    Of all A' with these rows and the Gram matrix :math:`A' A'^\top = A_{own} A_{own}^\top`, it turns O least,
    and is one's own where the row spaces agree. An optimiser goes on from there, whose moments belong to
    one's own factors: no direction is dead, as those of a singular value of zero are in canonical factors,
    and B' is at most the update's norm over the least singular value of one's own A. (The nearest A' of any
    Gram matrix, :math:`A_{own} Q Q^\top`, is nearly singular where one's own A hardly meets the row space;
    B' then grows from average to average until training breaks down.) A member whose own A is singular gets
    canonical factors.
    """
    a, b = canonical(A.double(), B.double())
    size = a.norm(dim=2, keepdim=True)
    # canonical rows are orthogonal; those of singular values beyond rounding are no directions of the update
    rows = torch.where(size > 1e-3 * size.amax(dim=1, keepdim=True), a / size.clamp(min=1e-300), 0.0)
    mine = own.double()
    rest = mine - mine @ rows.mT @ rows
    rest = 1e-3 * rest / rest.flatten(1).norm(dim=1).clamp(min=1e-300)[:, None, None]
    basis = torch.linalg.svd(torch.cat([rows, rest], dim=1), full_matrices=False).Vh[:, : A.shape[1]]
    u, values, vt = torch.linalg.svd(mine, full_matrices=False)
    fine = (values[:, -1] * LARGEST_CONDITION > values[:, 0])[:, None, None]
    left, _, right = torch.linalg.svd(u @ vt @ basis.mT)
    turn = left @ right
    root = (u * values[:, None]) @ u.mT
    inverse = (u / values.clamp(min=1e-300)[:, None]) @ u.mT
    turned = b @ (a @ basis.mT) @ turn.mT @ inverse
    return torch.where(fine, root @ turn @ basis, a).to(A), torch.where(fine, turned, b).to(B)


def concatenated(A: Tensor, B: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The exact mixtures as factors of rank U r: ``(V, U r, d_in)`` and ``(V, d_out, U r)``."""
    a, b = _side_by_side(A, B)
    scaled = b * weights.to(b).repeat_interleave(A.shape[1], dim=1)[:, None]
    return a.expand(len(weights), -1, -1), scaled


def gram(A: Tensor, B: Tensor) -> Tensor:
    r"""Inner products :math:`\langle B_u A_u, B_v A_v \rangle` of all pairs ``(U, U)``, in doubles."""
    b, a = B.double().mT.contiguous(), A.double()
    left = torch.einsum("urd,vsd->uvrs", b, b)
    return (left * torch.einsum("urd,vsd->uvrs", a, a)).sum(dim=(2, 3))


def norm(A: Tensor, B: Tensor) -> Tensor:
    """Frobenius' norm of each update ``(S,)``; small differences in concatenated factors do not cancel."""
    left, right = _thin(A.double(), B.double())
    return (left.r @ right.r.mT).flatten(1).norm(dim=1)


@dataclass(frozen=True, eq=False)
class _QR:
    q: Tensor
    r: Tensor


def _thin(A: Tensor, B: Tensor) -> tuple[_QR, _QR]:
    return _QR(*torch.linalg.qr(B)), _QR(*torch.linalg.qr(A.mT))


def _side_by_side(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """All users' factors in one product: ``(1, U r, d_in)`` and ``(1, d_out, U r)``."""
    return A.flatten(0, 1)[None], B.permute(1, 0, 2).flatten(1)[None]


def _svd(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U ``(S, d_out, k)``, the singular values ``(S, k)`` and V ``(S, d_in, k)``; k at most r."""
    left, right = _thin(A.double(), B.double())
    u, values, vt = torch.linalg.svd(left.r @ right.r.mT, full_matrices=False)
    return left.q @ u, values, right.q @ vt.mT


def _factors(u: Tensor, values: Tensor, v: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Balanced factors of the leading ranks, signs fixed, filled up with zeros."""
    u, values, v = u[..., :rank], values[:, :rank], v[..., :rank]
    largest = u.gather(1, u.abs().argmax(dim=1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0)
    root = values.sqrt()[:, None]
    more = (0, rank - values.shape[1])
    a, b = torch.nn.functional.pad(v * signs * root, more), torch.nn.functional.pad(u * signs * root, more)
    return a.mT.contiguous(), b


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole.clamp(min=torch.finfo(whole.dtype).tiny), 0.0)


def _check_rank(rank: int) -> None:
    if rank < 1:
        raise KilobayesError("a rank must be at least 1", f"found {rank}")
