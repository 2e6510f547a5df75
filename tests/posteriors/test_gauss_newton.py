from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kilobayes import tree
from kilobayes.posteriors.curvature import Curvature
from kilobayes.posteriors.gauss_newton import Side, diagonal, full, gauss_newton, kronecker
from kilobayes.protocols import Jacobian
from kilobayes.random import generator
from kilobayes.types import Params


def stream(leaves: Params, batch: int = 4) -> list[Jacobian]:
    rows = torch.arange(tree.size(leaves))
    return [Jacobian(r, torch.zeros(len(r), 3), tree.member(leaves, r)) for r in rows.split(batch)]


def random(rows: int, *shapes: tuple[int, ...], rank: int = 2) -> Params:
    gen = generator(9)
    return {f"s{i}/x": torch.randn(rows, rank, *shape, generator=gen) for i, shape in enumerate(shapes)}


def dense(found: Curvature, key: str, like: Tensor) -> Tensor:
    """F of a block, from what it does to the identity."""
    m, n = like.shape[-2:] if like.dim() > 3 else (1, like.shape[-1])
    total = torch.zeros(m * n, m * n)
    for piece in found.pieces(key, torch.eye(m * n).view(1, m * n, m, n)):
        x = piece.x * piece.values
        x = x if piece.left is None else piece.left @ x
        total += (x if piece.right is None else x @ piece.right.mT).flatten(2)[0]
    return total.double()


def explicit(leaves: Params) -> Tensor:
    """The sum over rows of G^T G."""
    flat = torch.cat([v.flatten(2) for v in leaves.values()], dim=2).flatten(0, 1).double()
    return flat.mT @ flat


@pytest.mark.parametrize("rows", [3, 30])
def test_full_is_the_sum_of_squares(rows: int) -> None:
    """With fewer rows than columns, and with more."""
    leaves = random(rows, (3, 4), (5,))
    found = full(iter(stream(leaves)), rows)
    assert found.right["*"].shape == (17, min(17, 2 * rows))
    torch.testing.assert_close(
        dense(found, "*", torch.zeros(1, 1, 17)), explicit(leaves), atol=1e-4, rtol=1e-5
    )


def test_diagonal_is_that_of_full() -> None:
    leaves = random(7, (3, 4), (5,))
    found = diagonal(iter(stream(leaves)))
    flat = torch.cat([found.values[k].flatten() for k in leaves])
    torch.testing.assert_close(flat.double(), explicit(leaves).diagonal(), rtol=1e-5, atol=1e-5)


def test_kronecker_is_the_product_of_both_sides() -> None:
    leaves = random(6, (3, 4))
    g = leaves["s0/x"].double().flatten(0, 1)
    left, right = torch.einsum("bmn,bkn->mk", g, g), torch.einsum("bmn,bmk->nk", g, g)
    found = kronecker(iter(stream(leaves)), 10, generator(1))
    wanted = torch.kron(left, right) / left.trace()
    torch.testing.assert_close(dense(found, "s0/x", leaves["s0/x"]), wanted, atol=1e-4, rtol=1e-4)
    assert float(wanted.trace()) == pytest.approx(float(explicit(leaves).trace()))


def test_structures_agree_where_one_row_has_one_direction() -> None:
    """One row, G = u v^T: a Kronecker product; of u and v along axes, a diagonal too."""
    u, v = torch.randn(3, generator=generator(1)), torch.randn(80, generator=generator(2))
    for left, right in ((u, v), (torch.eye(3)[1], 2.0 * torch.eye(80)[70])):
        leaves = {"a/x": torch.outer(left, right)[None, None]}
        found = {
            s: gauss_newton(s, iter(stream(leaves)), 1, 1, generator(3)) for s in ("kron", "diag", "full")
        }
        wanted = explicit(leaves)
        torch.testing.assert_close(dense(found["kron"], "a/x", leaves["a/x"]), wanted, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            dense(found["full"], "*", torch.zeros(1, 1, 240)), wanted, atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(found["diag"].values["a/x"].flatten().double(), wanted.diagonal())
    torch.testing.assert_close(wanted.diagonal().diag(), wanted)  # of the second pair


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize("precision", [0.3, 40.0])
def test_woodbury_and_determinant_equal_dense_algebra(structure: str, precision: float) -> None:
    """Sides small and wide, cut back to a rank and not, in one."""
    leaves = random(5, (3, 70), (7,), (4, 3)) if structure != "full" else random(5, (3, 4), (7,))
    found = gauss_newton(structure, iter(stream(leaves)), 5, 6, generator(2))
    parts = found.blocks(leaves)
    matrix = (
        torch.block_diag(*[dense(found, k, v) for k, v in parts.items()])
        if structure != "diag"
        else (torch.cat([found.values[k].flatten() for k in parts]).diag().double())
    )
    jacobian = torch.cat([v.flatten(2) for v in parts.values()], dim=2).double()
    inverse = torch.linalg.inv(matrix + precision * torch.eye(len(matrix)))
    result = found.covariances(leaves, torch.tensor([1.0, precision]))[1]
    torch.testing.assert_close(result, jacobian @ inverse @ jacobian.mT, rtol=1e-4, atol=1e-5)
    wanted = float(torch.logdet(torch.eye(len(matrix)) + matrix / precision))
    assert found.log_determinant(precision) == pytest.approx(wanted, rel=1e-4)
    # the root is one: its square over basis vectors is the inverse
    count = len(matrix)
    noise, at = {}, 0
    for key, value in parts.items():
        size = value[0, 0].numel()
        noise[key] = torch.eye(count)[:, at : at + size].reshape(1, count, *value.shape[2:])
        at += size
    root = torch.cat([v.flatten(2)[0] for v in found.root(noise, precision).values()], dim=1).double()
    torch.testing.assert_close(root.mT @ root, inverse, rtol=1e-3, atol=1e-4)


def test_a_wide_side_loses_nothing_within_its_rank() -> None:
    """Rows of rank 6 in 90 dimensions, kept by 8 vectors: equal to dense in any order and in any batches."""
    gen = generator(4)
    rows = torch.randn(60, 6, generator=gen) @ torch.randn(6, 90, generator=gen)
    wanted = rows.double().mT @ rows.double()
    for order, batch in (
        (torch.arange(60), 60),
        (torch.randperm(60, generator=gen), 7),
        (torch.arange(60), 1),
    ):
        side = Side.empty(90, 8)
        for part in rows[order].split(batch):
            side = side.add(part, gen)
        vectors, values = side.eigen()
        assert vectors.shape == (90, 8)
        assert side.kept.numel() == 8 * 90
        result = (vectors * values[:8]) @ vectors.mT
        torch.testing.assert_close(result.double(), wanted, atol=1e-4 * float(wanted.max()), rtol=1e-4)


def test_rank_of_the_whole_width_is_dense() -> None:
    rows = torch.randn(300, 70, generator=generator(5))
    whole, cut = Side.empty(70, 70), Side(torch.zeros(()), torch.zeros(0, 70), 70)
    assert not whole.rank
    for part in rows.split(50):
        whole, cut = whole.add(part, generator(1)), cut.add(part, generator(1))
    torch.testing.assert_close(cut.eigen()[1][:70].sort()[0], whole.eigen()[1], rtol=1e-4, atol=1e-3)
    (u, e), (v, d) = whole.eigen(), cut.eigen()
    torch.testing.assert_close((u * e) @ u.mT, (v * d[:70]) @ v.mT, rtol=1e-4, atol=1e-3)


def test_what_is_cut_off_keeps_its_trace() -> None:
    leaves = random(20, (2, 100))
    found = kronecker(iter(stream(leaves)), 5, generator(1))
    assert found.right["s0/x"].shape == (100, 5)
    assert found.values["s0/x"].shape == (2, 6)
    matrix = dense(found, "s0/x", leaves["s0/x"])
    assert float(matrix.trace()) == pytest.approx(float(explicit(leaves).trace()), rel=1e-4)
    assert float(torch.linalg.eigvalsh(matrix)[0]) > 0.0
