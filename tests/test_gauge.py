from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kilobayes import gauge
from kilobayes.errors import KilobayesError
from kilobayes.random import generator


def factors(
    users: int = 3, r: int = 4, d_in: int = 20, d_out: int = 15, seed: int = 0
) -> tuple[Tensor, Tensor]:
    gen = generator(seed)
    return torch.randn(users, r, d_in, generator=gen), torch.randn(users, d_out, r, generator=gen)


def product(a: Tensor, b: Tensor) -> np.ndarray:
    return (b.double() @ a.double()).numpy()


def best(matrix: np.ndarray, rank: int) -> np.ndarray:
    """Eckart and Young's, by numpy."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


@pytest.mark.parametrize(("r", "d_in", "d_out"), [(4, 20, 15), (1, 7, 9), (6, 4, 9), (6, 9, 4)])
def test_canonical_factors_are_the_update_s_own(r: int, d_in: int, d_out: int) -> None:
    """The same update, balanced, and the same whatever invertible matrix is put between the factors."""
    a, b = factors(3, r, d_in, d_out)
    x, y = gauge.canonical(a, b)
    assert x.shape == a.shape
    assert y.shape == b.shape
    np.testing.assert_allclose(product(x, y), product(a, b), atol=1e-5)
    values = np.linalg.svd(product(a, b), compute_uv=False)[:, :r]
    wanted = np.zeros((3, r))
    wanted[:, : values.shape[1]] = values
    for gram in (y.mT @ y, x @ x.mT):
        np.testing.assert_allclose(gram, [np.diag(v) for v in wanted], atol=1e-4)
    turn = torch.randn(3, r, r, generator=generator(5)).double() + 3 * torch.eye(r, dtype=torch.double)
    x2, y2 = gauge.canonical(turn @ a.double(), b.double() @ torch.linalg.inv(turn))
    torch.testing.assert_close(x2.float(), x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(y2.float(), y, atol=1e-4, rtol=1e-4)
    top = np.take_along_axis(y.numpy(), np.abs(y.numpy()).argmax(axis=1, keepdims=True), axis=1)
    assert (top >= 0).all()
    alone = gauge.canonical(a[1:2], b[1:2])
    torch.testing.assert_close(alone[0][0], x[1])


def test_a_rotated_user_moves_the_mean_of_factors_but_no_other() -> None:
    a, b = factors(2)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator(1)))[0]
    rotated = torch.stack([a[0], turn @ a[1]]), torch.stack([b[0], b[1] @ turn.T])
    half = torch.full((1, 2), 0.5)

    def moved(how: str) -> float:
        one, two = gauge.average(a, b, half, how=how), gauge.average(*rotated, half, how=how)
        before = product(one.A, one.B)
        return float(np.linalg.norm(product(two.A, two.B) - before) / np.linalg.norm(before))

    assert moved("factors") > 0.5
    assert moved("canonical") < 1e-5
    assert moved("updates") < 1e-5


@pytest.mark.parametrize("rank", [1, 3, 4, 12, None])
def test_the_average_of_updates_is_the_best_of_its_rank(rank: int | None) -> None:
    a, b = factors()
    weights = torch.tensor([[0.5, 0.3, 0.2], [1.0, -0.7, 0.0]])
    found = gauge.average(a, b, weights, rank=rank)
    exact = np.einsum("vu,uoi->voi", weights.double().numpy(), product(a, b))
    wanted = best(exact, rank or 12)
    np.testing.assert_allclose(product(found.A, found.B), wanted, atol=1e-4)
    lost = np.linalg.norm(exact - wanted, axis=(1, 2)) / np.linalg.norm(exact, axis=(1, 2))
    np.testing.assert_allclose(found.lost, lost, atol=1e-6)
    assert found.A.shape[1] == (rank or 12)  # 12 = 3 users of rank 4, under the smaller side


@pytest.mark.parametrize("how", ["factors", "canonical"])
def test_means_of_factors_say_how_far_off_they_are(how: str) -> None:
    a, b = factors()
    weights = torch.tensor([[0.5, 0.3, 0.2]])
    found = gauge.average(a, b, weights, how=how)
    if how == "factors":
        torch.testing.assert_close(found.A[0], torch.einsum("u,uri->ri", weights[0], a))
    exact = np.einsum("vu,uoi->voi", weights.double().numpy(), product(a, b))
    off = np.linalg.norm(product(found.A, found.B) - exact) / np.linalg.norm(exact)
    assert float(found.lost) == pytest.approx(off, rel=1e-5)


def test_shared_factors_average_exactly() -> None:
    """Users of one A lose nothing at their own rank, and by none of the three ways."""
    a, b = factors()
    a = a[:1].expand(3, -1, -1)
    weights = torch.full((1, 3), 1 / 3)
    for how in ("updates", "factors"):
        assert float(gauge.average(a, b, weights, rank=4, how=how).lost) < 1e-7


def test_truncation_and_zero() -> None:
    a, b = factors()
    found = gauge.truncate(a, b, 2)
    np.testing.assert_allclose(product(found.A, found.B), best(product(a, b), 2), atol=1e-4)
    assert gauge.truncate(a, b, 9).A.shape == (3, 9, 20)
    assert gauge.truncate(a, b, 9).lost.max() < 1e-12
    zero = gauge.average(a, torch.zeros_like(b), torch.ones(1, 3), rank=2)
    assert zero.lost.tolist() == [0.0]
    assert not zero.B.any()
    # the same update with opposite signs cancels, up to rounding, and is finite
    gone = gauge.average(a[:1].repeat(2, 1, 1), b[:1].repeat(2, 1, 1), torch.tensor([[1.0, -1.0]]))
    assert product(gone.A, gone.B).max() < 1e-6


def test_inner_products_and_norms() -> None:
    a, b = factors()
    flat = product(a, b).reshape(3, -1)
    np.testing.assert_allclose(gauge.gram(a, b), flat @ flat.T, rtol=1e-9)
    np.testing.assert_allclose(gauge.norm(a, b), np.linalg.norm(flat, axis=1), rtol=1e-9)


def test_what_is_refused() -> None:
    a, b = factors()
    with pytest.raises(KilobayesError, match="cannot average by 'mean'"):
        gauge.average(a, b, torch.ones(1, 3), how="mean")
    with pytest.raises(KilobayesError, match="3 users"):
        gauge.average(a, b, torch.ones(1, 2))
    with pytest.raises(KilobayesError, match="rank"):
        gauge.average(a, b, torch.ones(1, 3), rank=0)


def test_factors_turned_from_one_s_own_hold_the_same_update() -> None:
    gen = torch.Generator().manual_seed(12)
    own = torch.randn(2, 3, 10, generator=gen)
    b = torch.randn(2, 8, 3, generator=gen)
    turn = torch.randn(2, 3, 3, generator=gen)
    a_back, b_back = gauge.towards(turn @ own, b @ torch.linalg.inv(turn), own)
    torch.testing.assert_close(a_back, own, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(b_back, b, rtol=1e-3, atol=1e-3)
    apart = torch.zeros(2, 3, 10)
    apart[:, :, 7:] = torch.eye(3)  # rows that one's own A never meets
    own[:, :, 7:] = 0.0
    a_far, b_far = gauge.towards(apart, b, own)
    torch.testing.assert_close(b_far @ a_far, b @ apart, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a_far @ a_far.mT, own @ own.mT, rtol=1e-4, atol=1e-4)
    singular = own.clone()
    singular[:, 1] = singular[:, 0]  # nothing to turn: canonical factors
    a_none, b_none = gauge.towards(apart, b, singular)
    torch.testing.assert_close(a_none, gauge.canonical(apart, b)[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(b_none @ a_none, b @ apart, rtol=1e-4, atol=1e-4)


def test_no_turn_of_the_same_gram_matrix_is_smaller() -> None:
    """Against many other turns within the rows of the update, where one's own A has orthonormal rows."""
    gen = torch.Generator().manual_seed(14)
    own = torch.linalg.qr(torch.randn(10, 3, generator=gen)).Q.mT[None]
    a, b = own + 0.5 * torch.randn(1, 3, 10, generator=gen), torch.randn(1, 8, 3, generator=gen)
    found, _ = gauge.towards(a, b, own)
    turns = torch.linalg.qr(torch.randn(500, 3, 3, generator=gen)).Q
    small = torch.linalg.qr(torch.eye(3) + 0.1 * torch.randn(500, 3, 3, generator=gen)).Q
    small = small * torch.linalg.diagonal(small).sign()[:, None]  # near the identity
    others = (torch.cat([turns, small]) @ found - own).flatten(1).norm(dim=1)
    assert float((found - own).norm()) <= float(others.min()) + 1e-5


def test_factors_stay_sound_over_many_averages() -> None:
    """Users whose updates have nothing in common, averaged and averaged again as they go on."""
    gen = torch.Generator().manual_seed(13)
    a, b = torch.randn(4, 2, 30, generator=gen), torch.randn(4, 20, 2, generator=gen)
    spread = torch.linalg.cond(a).max()
    weights = torch.full((4, 4), 0.25)
    for _ in range(20):
        mixed = gauge.average(a, b, weights, rank=2)
        most = gauge.norm(mixed.A, mixed.B) / torch.linalg.svdvals(a)[:, -1]
        a, b = gauge.towards(mixed.A, mixed.B, a)
        assert float(torch.linalg.cond(a).max()) < 1.01 * float(spread)
        assert bool((b.flatten(1).norm(dim=1) <= 1.001 * most).all())
        b = b + torch.randn(4, 20, 2, generator=gen) / 3  # what each learns until the next
