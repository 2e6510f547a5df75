from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from kilobayes import collaboration as c
from kilobayes import gauge
from kilobayes.errors import KilobayesError
from kilobayes.random import generator

NAN, INF = math.nan, math.inf


def scores(users: int = 4, rows: int = 6, classes: int = 5) -> Tensor:
    return torch.randn(users, rows, classes, generator=generator(1))


def soft(s: np.ndarray, tau: float, n: np.ndarray) -> np.ndarray:
    e = n * np.exp(s / tau)
    return e / e.sum(axis=1, keepdims=True)


N = np.array([10.0, 20.0, 5.0, 65.0])


def test_each_scheme_against_numpy() -> None:
    f = scores().double().numpy()
    p = np.exp(f) / np.exp(f).sum(axis=2, keepdims=True)

    def kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a * np.log(a / b)).sum(axis=1).mean()

    js = np.array([[(kl(x, (x + y) / 2) + kl(y, (x + y) / 2)) / 2 for y in p] for x in p])
    np.testing.assert_allclose(c.distances(scores()), js, atol=1e-12)
    np.testing.assert_allclose(c.prediction_trust(scores(), rows=N, temperature=0.2), soft(-js, 0.2, N))

    kept = np.where(f >= np.sort(f, axis=2)[:, :, -3:-2], f, 0.0)
    l1 = np.array([[np.abs(x - y).sum(axis=1).mean() for y in kept] for x in kept])
    np.testing.assert_allclose(c.distances(scores(), "l1", keep=3), l1)
    published = soft(-10 * l1 / l1.sum(axis=1, keepdims=True), 1.0, np.ones(4))
    ours = c.prediction_trust(scores(), distance="l1", keep=3, relative=True, temperature=0.1)
    np.testing.assert_allclose(ours, published)

    losses = torch.rand(4, 4, generator=generator(2))
    np.testing.assert_allclose(
        c.validation_trust(losses, temperature=0.3, rows=N), soft(-losses.double().numpy(), 0.3, N)
    )

    a, b = torch.randn(4, 2, 7, generator=generator(3)), torch.randn(4, 9, 2, generator=generator(4))
    flat = (b.double() @ a.double()).flatten(1).numpy()
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    cosines = c.cosines_of(gauge.gram(a, b))
    np.testing.assert_allclose(cosines, flat @ flat.T, atol=1e-9)
    np.testing.assert_allclose(c.weight_trust(cosines, rows=N), soft(flat @ flat.T, 0.5, N))


def same_weights(users: int) -> Tensor:
    a, b = torch.randn(1, 2, 7, generator=generator(3)), torch.randn(1, 9, 2, generator=generator(4))
    # what makes them one, not how they are factored
    turns = torch.linalg.qr(torch.randn(users, 2, 2, generator=generator(5)))[0]
    return c.cosines_of(gauge.gram(turns @ a, b @ turns.mT))


SCHEMES: dict[str, Callable[..., Tensor]] = {
    "weights": lambda n: c.weight_trust(same_weights(4), rows=n),
    "predictions": lambda n: c.prediction_trust(scores(1).expand(4, -1, -1), rows=n),
    "relative": lambda n: c.prediction_trust(
        scores(1).expand(4, -1, -1), distance="l1", relative=True, rows=n
    ),
    "validation": lambda n: c.validation_trust(torch.rand(4, 1).expand(4, 4), rows=n),
    "oracle": lambda n: c.oracle([2, 2, 2, 2], rows=n),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("n", [None, N.tolist()])
def test_identical_users_are_averaged_as_fedavg_does(scheme: str, n: list[float] | None) -> None:
    found = SCHEMES[scheme](n)
    torch.testing.assert_close(found, c.fedavg([1] * 4 if n is None else n), atol=1e-6, rtol=0)


def test_a_user_of_other_data_is_trusted_less() -> None:
    own, other = scores(1), -scores(1)
    near = own + 0.05 * torch.randn(3, 6, 5, generator=generator(6))
    w = c.prediction_trust(torch.cat([near, other]))
    assert bool((w[:3, 3] < 0.1 * w[:3, :3].min(dim=1).values).all())
    assert float(w[3, 3]) > 0.8
    losses = torch.tensor([[0.5, 0.52, 1.5], [0.51, 0.5, 1.6], [1.4, 1.5, 0.3]])
    w = c.validation_trust(losses)
    assert bool((w[:2, 2] < 1e-3).all())
    assert float(w[2, 2]) > 0.999
    w = c.weight_trust(torch.tensor([[1.0, 0.9, -0.2], [0.9, 1.0, 0.0], [-0.2, 0.0, 1.0]]))
    assert bool((w[:2, 2] < w[:2, :2].min(dim=1).values / 4).all())


@pytest.mark.parametrize("users", [1, 2, 9])
def test_rows_sum_to_one(users: int) -> None:
    """Which the newest published code does not keep: there rows sum to 0.98 to 1.30."""
    f = scores(users)
    for w in (
        c.local(users),
        c.fedavg(range(1, users + 1)),
        c.oracle(torch.rand(users, 3, generator=generator(2))),
        c.weight_trust(c.cosines_of(f.flatten(1) @ f.flatten(1).T)),
        c.prediction_trust(f),
        c.prediction_trust(f, distance="l1", relative=True),
        c.validation_trust(f[:, :, 0] @ f[:, :, 0].T, top=1),
    ):
        assert w.shape == (users, users)
        np.testing.assert_allclose(w.sum(dim=1), 1.0)
        assert bool((w >= 0).all())


def test_trust_does_not_depend_on_a_score_s_origin_or_on_bystanders() -> None:
    """Huge losses do not overflow; a user whom nobody trusts changes nobody's trust in the others."""
    losses = torch.rand(3, 3, generator=generator(1))
    torch.testing.assert_close(
        c.validation_trust(losses + 900.0), c.validation_trust(losses), atol=1e-3, rtol=0
    )
    more = torch.full((4, 4), 50.0)
    more[:3, :3] = losses
    torch.testing.assert_close(c.validation_trust(more)[:3, :3], c.validation_trust(losses))


def test_top_and_least_keep_oneself() -> None:
    s = torch.tensor([[0.0, 3.0, 2.0], [1.0, 0.0, -1.0], [0.5, 0.4, 0.0]])
    w = c.softmax(s, 1.0, top=2)
    assert (w > 0).tolist() == [[True, True, False], [True, True, False], [True, False, True]]
    assert (c.softmax(s, 1.0, least=0.9) > 0).tolist() == [
        [True, True, True],
        [True, True, False],
        [False, False, True],
    ]
    assert torch.equal(c.softmax(s, 1.0, top=1), c.local(3))


def test_what_diverged_is_not_trusted() -> None:
    losses = torch.tensor([[0.4, NAN, INF], [0.5, NAN, INF], [0.5, 0.6, 0.4]])
    w = c.validation_trust(losses)
    assert w[:2].tolist() == [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    with pytest.raises(KilobayesError, match="user 1 is left with nobody"):
        c.validation_trust(torch.tensor([[0.4, NAN], [NAN, INF]]))


def test_a_round_that_some_miss() -> None:
    w = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.6, 0.3], [0.0, 1.0, 0.0]])
    found = c.among(w, [True, False, True])
    torch.testing.assert_close(found, torch.tensor([[2 / 3, 0.0, 1 / 3], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    assert torch.equal(c.among(w, [True] * 3), w)


def test_the_oracle() -> None:
    assert c.oracle([0, 1, 0]).tolist() == [[0.5, 0.0, 0.5], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]]
    p = np.array([[0.75, 0.25], [0.25, 0.75]])
    pp = p @ p.T
    np.testing.assert_allclose(c.oracle(torch.tensor(p)), pp / pp.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(c.oracle([0, 0], rows=[1, 3]), [[0.25, 0.75]] * 2)


def test_certain_predictions_have_finite_distances() -> None:
    certain = torch.tensor([[[0.0, -INF]], [[-INF, 0.0]], [[0.0, 0.0]]])
    d = c.distances(certain)
    assert float(d[0, 1]) == pytest.approx(math.log(2))
    assert bool(d.isfinite().all())


def test_an_update_of_zero_is_like_nobody_but_itself() -> None:
    assert c.cosines_of(torch.diag(torch.tensor([4.0, 0.0]))).tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_what_is_refused() -> None:
    with pytest.raises(KilobayesError, match="temperature"):
        c.softmax(torch.eye(2), 0.0)
    with pytest.raises(KilobayesError, match="distance 'l3'"):
        c.distances(scores(), "l3")
    with pytest.raises(KilobayesError, match="users, users"):
        c.softmax(torch.ones(2, 3), 1.0)
    with pytest.raises(KilobayesError, match="numbers of rows"):
        c.fedavg([0, 0])
    with pytest.raises(KilobayesError, match="numbers of rows"):
        c.softmax(torch.eye(2), 1.0, rows=[1, 2, 3])
    with pytest.raises(KilobayesError, match="top"):
        c.softmax(torch.eye(2), 1.0, top=0)
    with pytest.raises(KilobayesError, match=r"rows, classes"):
        c.prediction_trust(torch.ones(2, 3))
