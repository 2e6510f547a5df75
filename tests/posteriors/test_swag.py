"""SWA and SWAG against numpy, closed forms and Monte Carlo."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kilobayes import tree
from kilobayes.posteriors import SWA, SWAG
from kilobayes.posteriors.swag import SWAGState
from kilobayes.random import Streams, generator
from kilobayes.types import Params, Progress


def collect(method: SWA | SWAG, trajectory: list[Params], finish: bool = True) -> SWAGState:
    """The state after a trajectory whose every step is a snapshot."""
    steps = len(trajectory) + (not finish)
    state = method.init(tree.map_params(torch.zeros_like, trajectory[0]), generator(1))
    for step, theta in enumerate(trajectory, 1):
        state = method.observe(state, theta, Progress(step, steps, 1, 10))  # type: ignore[arg-type]
    return state  # type: ignore[return-value]


def everything(rank: int = 10, scale: float = 1.0) -> SWAG:
    return SWAG(rank=rank, scale=scale, start=0.0, snapshots=10**6)


def wander(steps: int, members: int = 2, offset: float = 0.0, seed: int = 3) -> list[Params]:
    streams = Streams([generator(seed, m) for m in range(members)])
    like = {"s/A": torch.empty(members, 2, 3), "s/B": torch.empty(members, 2)}
    scales = {"s/A": 0.5, "s/B": 2.0}
    return [{k: offset + scales[k] * streams.normal(v) for k, v in like.items()} for _ in range(steps)]


def draws(method: SWAG, state: SWAGState, count: int, seed: int = 5) -> np.ndarray:
    """``(count, P)`` float64."""
    return tree.flat(method.sample(state, count, generator(seed))).double().numpy()


def closed_form(rows: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of SWAG from the snapshots ``(n, P)`` of one member, by the paper's definition."""
    n = len(rows)
    running = np.cumsum(rows, axis=0) / np.arange(1, n + 1)[:, None]
    diagonal = np.diag(rows.var(axis=0))
    if not rank:
        return running[-1], diagonal
    held = (rows - running)[-rank:]
    return running[-1], diagonal / 2 + held.T @ held / (2 * (len(held) - 1))


def assert_moments(found: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> None:
    """Sample mean and covariance of a Gaussian within 5 Monte-Carlo standard errors, entry by entry."""
    n, variances = len(found), np.diag(covariance)
    assert (np.abs(found.mean(axis=0) - mean) <= 5 * np.sqrt(variances / n) + 1e-7).all()
    error = np.sqrt((np.outer(variances, variances) + covariance**2) / n)
    assert (np.abs(np.cov(found.T).reshape(covariance.shape) - covariance) <= 5 * error + 1e-7).all()


def test_three_scalar_snapshots() -> None:
    method = everything(rank=3)
    state = collect(method, [{"s/x": torch.tensor([[float(i)]])} for i in range(3)])
    assert float(state.average["s/x"]) == 1.0
    assert float(state.squares["s/x"]) / 3 == pytest.approx(2 / 3)
    assert state.deviations["s/x"].flatten().tolist() == [0.0, 0.5, 1.0]
    assert state.count.tolist() == [3.0]
    covariance = np.array([[2 / 3 / 2 + 1.25 / 2 / 2]])
    assert covariance[0, 0] == pytest.approx(0.6458, abs=5e-5)
    assert_moments(draws(method, state, 40_000), np.array([1.0]), covariance)


@pytest.mark.parametrize(
    ("rank", "scale", "steps"), [(4, 1.0, 9), (20, 0.5, 6), (2, 2.0, 12), (0, 1.0, 7), (0, 0.3, 5)]
)
def test_draws_have_the_closed_form_moments_of_their_member(rank: int, scale: float, steps: int) -> None:
    method, trajectory, count = everything(rank, scale), wander(steps), 60_000
    state = collect(method, trajectory)
    found = draws(method, state, 2 * count)
    snapshots = torch.stack([tree.flat(theta) for theta in trajectory]).double().numpy()
    for member in range(2):
        mean, covariance = closed_form(snapshots[:, member], rank)
        assert_moments(found[member * count : (member + 1) * count], mean, scale * covariance)
    if rank:
        cross = closed_form(snapshots[:, 0], rank)[1][:6, 6:]
        assert (
            np.abs(cross).max() > 0.1
        )  # leaves are correlated here, or the test would not see a lost correlation


def test_a_walk_around_a_known_gaussian() -> None:
    """Independent snapshots from N(mu, Sigma): many of them show Sigma's own diagonal."""
    n = 5000
    gen = generator(8)
    factor = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    rows = torch.randn(n, 2, generator=gen) @ factor.T + torch.tensor([3.0, -1.0])
    state = collect(everything(rank=2), [{"s/x": row[None]} for row in rows])
    variance = (state.squares["s/x"] / n)[0].double().numpy()
    np.testing.assert_allclose(variance, [1.0, 1.0], atol=5 * np.sqrt(2 / n))
    np.testing.assert_allclose(state.average["s/x"][0].numpy(), [3.0, -1.0], atol=5 / np.sqrt(n))


def test_streaming_equals_batch_moments_far_from_zero() -> None:
    trajectory = [tree.map_params(lambda t: t.double() + 1e6, theta) for theta in wander(200)]
    state = collect(everything(rank=5), trajectory, finish=False)
    for key in trajectory[0]:
        rows = np.stack([theta[key].numpy() for theta in trajectory]).astype(np.longdouble)
        mean = rows.mean(axis=0)
        assert state.average[key].dtype == torch.float64
        np.testing.assert_allclose(state.average[key].numpy(), mean.astype(float), rtol=1e-12)
        # the snapshots themselves carry 1e6 * 2^-53 = 1e-10 of rounding in each running mean
        np.testing.assert_allclose(
            state.squares[key].numpy(), ((rows - mean) ** 2).sum(axis=0).astype(float), rtol=1e-9
        )


def test_streaming_equals_batch_moments_to_the_last_digits() -> None:
    trajectory = [tree.map_params(lambda t: t.double() + 50.0, theta) for theta in wander(300)]
    state = collect(everything(), trajectory, finish=False)
    for key in trajectory[0]:
        rows = np.stack([theta[key].numpy() for theta in trajectory]).astype(np.longdouble)
        squares = ((rows - rows.mean(axis=0)) ** 2).sum(axis=0).astype(float)
        np.testing.assert_allclose(state.squares[key].numpy(), squares, rtol=1e-12)


def test_rounded_once_at_the_end() -> None:
    trajectory = wander(50, offset=1000.0)
    state, method = collect(everything(), trajectory), everything()
    for key in trajectory[0]:
        rows = np.stack([theta[key].double().numpy() for theta in trajectory])
        assert state.average[key].dtype == state.squares[key].dtype == torch.float32
        step = np.spacing(np.float32(1000.0))
        assert np.abs(state.average[key].numpy() - rows.mean(axis=0)).max() <= 0.51 * step
        np.testing.assert_allclose(state.squares[key].numpy(), rows.var(axis=0) * 50, rtol=2e-7)
    assert method.sample(state, 3, generator(1))["s/A"].dtype == torch.float32


def test_swa_is_the_mean_and_scale_zero_is_swa_bit_for_bit() -> None:
    trajectory = wander(9, members=3, offset=0.1)
    swa, swag = SWA(start=0.4, snapshots=3), SWAG(start=0.4, snapshots=3, scale=0.0, rank=2)
    average, gaussian = collect(swa, trajectory), collect(swag, trajectory)
    rows = torch.stack([tree.flat(trajectory[i]).double() for i in (5, 7, 8)])
    assert [s for s in range(1, 10) if s > 4 and (s - 4) * 3 // 5 > (s - 5) * 3 // 5] == [6, 8, 9]
    torch.testing.assert_close(tree.flat(average.average), rows.mean(dim=0).float(), rtol=1e-7, atol=1e-8)
    assert swag.support(gaussian) == swa.support(average) == 3
    assert not tree.first_difference(
        swag.sample(gaussian, 7, generator(2)), swa.sample(average, 7, generator(3))
    )
    assert not tree.first_difference(swag.mean(gaussian), swa.mean(average))


def test_one_snapshot_has_no_covariance() -> None:
    trajectory = wander(1)
    with pytest.warns(UserWarning, match="fewer than two snapshots"):
        state = collect(everything(), trajectory)
    assert everything().support(state) == 2
    assert not tree.first_difference(everything().sample(state, 2, generator(1)), trajectory[0])


def test_two_snapshots_at_a_rank_above_them() -> None:
    trajectory = wander(2, members=1)
    state = collect(everything(rank=9), trajectory)
    snapshots = torch.stack([tree.flat(theta)[0] for theta in trajectory]).double().numpy()
    assert_moments(draws(everything(rank=9), state, 40_000), *closed_form(snapshots, 9))


def test_members_do_not_mix() -> None:
    trajectory = wander(6, members=3)
    together = collect(everything(rank=3), trajectory)
    for member in range(3):
        alone = collect(everything(rank=3), [tree.member(theta, member) for theta in trajectory])
        odd = tree.first_difference(
            tree.flatten_state(alone), tree.flatten_state(tree.state_member(together, member))
        )
        assert not odd


def test_draws_are_independent_of_the_order_of_keys() -> None:
    state = collect(everything(rank=3), wander(6))
    turned = SWAGState(
        *({k: getattr(state, f)[k] for k in ("s/B", "s/A")} for f in ("average", "squares", "deviations")),
        state.count,
    )
    a, b = (everything(rank=3).sample(s, 4, generator(1)) for s in (state, turned))
    assert not tree.first_difference(a, b)


@pytest.mark.parametrize("wrong", [{"rank": 1}, {"rank": -1}, {"scale": -0.1}, {"scale": float("inf")}])
def test_settings_outside_their_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SWAG(**wrong)  # type: ignore[arg-type]
