from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from kilobayes import tree
from kilobayes.posteriors import SWAG, Ensemble, Point, Temperature, ask
from kilobayes.posteriors.temperature import TemperatureState, best_temperature
from kilobayes.random import generator
from kilobayes.testing.posteriors import observed
from kilobayes.types import Params


def simulated(
    rows: int, true: float, seed: int, members: int = 1, noise: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Scores ``(S, N, 4)`` and labels drawn from softmax(scores of the first / true)."""
    gen = generator(seed)
    logits = 2 * torch.randn(rows, 4, generator=gen, dtype=torch.float64)
    labels = torch.multinomial((logits / true).softmax(-1), 1, generator=gen)[:, 0]
    return logits + noise * torch.randn(members, rows, 4, generator=gen, dtype=torch.float64), labels


def mixture_nll(logits: Tensor, labels: Tensor, t: float) -> float:
    """By numpy: mean NLL of probabilities averaged over members."""
    scores = logits.numpy() / t
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return float(-np.log(p.mean(0)[np.arange(len(labels)), labels.numpy()]).mean())


@pytest.mark.parametrize("true", [0.4, 1.0, 2.7])
def test_recovers_the_temperature_of_simulated_data(true: float) -> None:
    logits, labels = simulated(20_000, true, seed=int(10 * true))
    # Fisher information of b = 1/T is the variance of the scores under the model, summed over rows
    p = (logits[0] / true).softmax(-1)
    information = float(((p * logits[0] ** 2).sum(-1) - (p * logits[0]).sum(-1) ** 2).sum())
    error = true**2 / math.sqrt(information)
    assert abs(best_temperature(logits, labels) - true) < 5 * error
    assert error < 0.05 * true


@pytest.mark.parametrize(("members", "noise"), [(1, 0.0), (5, 1.5), (3, 6.0)])
def test_equals_brute_force(members: int, noise: float) -> None:
    logits, labels = simulated(300, 1.6, seed=4, members=members, noise=noise)
    found = best_temperature(logits, labels)
    grid = np.exp(np.linspace(-3, 3, 2001))
    values = [mixture_nll(logits, labels, t) for t in grid]
    at = int(np.argmin(values))
    exact = minimize_scalar(
        lambda t: mixture_nll(logits, labels, t), bounds=(grid[at - 1], grid[at + 1]), method="bounded",
        options={"xatol": 1e-10},
    )  # fmt: skip
    assert found == pytest.approx(exact.x, rel=1e-4)
    assert mixture_nll(logits, labels, found) <= min(values) + 1e-12


@pytest.mark.parametrize("seed", range(8))
def test_never_worse_than_none_on_the_rows_of_the_fit(seed: int) -> None:
    gen = generator(seed, 3)
    logits = 4 * torch.randn(3, 9, 3, generator=gen, dtype=torch.float64)
    labels = torch.randint(3, (9,), generator=gen)
    assert mixture_nll(logits, labels, best_temperature(logits, labels)) <= mixture_nll(logits, labels, 1.0)


def test_perfect_and_useless_scores_stay_within_bounds() -> None:
    labels = torch.tensor([0, 1, 2, 0])
    sure = torch.eye(3, dtype=torch.float64)[labels][None]
    assert best_temperature(sure, labels) == pytest.approx(math.exp(-3), rel=1e-3)
    assert best_temperature(-sure, labels) == pytest.approx(math.exp(3), rel=1e-3)


class Energy:
    """Scores ``(S, N, 3)``: features times a scale per draw."""

    def __init__(self, labels: Tensor, features: Tensor) -> None:
        self.labels, self.features = labels, features
        self.asked: list[int] = []

    def logits(self, theta: Params) -> Tensor:
        self.asked.append(tree.size(theta))
        return theta["s/x"][:, :, None] * self.features


def energy() -> Energy:
    logits, labels = simulated(200, 1.0, seed=2)
    return Energy(labels, logits[0])


def swag_state(method: SWAG, members: int) -> object:
    gen = generator(6)
    sizes = torch.arange(1, members + 1)[:, None]
    return observed(method, [{"s/x": sizes + 0.2 * torch.randn(members, 1, generator=gen)} for _ in range(6)])


def test_members_of_an_ensemble_get_their_own_temperature() -> None:
    base, some = SWAG(rank=2, start=0.0, snapshots=5), energy()
    method = Ensemble(Temperature(base, samples=4), members=3)
    state = method.fit(TemperatureState(swag_state(base, 3), torch.ones(3)), some, generator(1))
    assert state.temperature.shape == (3,)
    # member m's scores are about m times the true ones, so its temperature is about m
    np.testing.assert_allclose(state.temperature.numpy(), [1, 2, 3], rtol=0.35)
    assert some.asked == [4, 4, 4]
    logits = torch.ones(6, 2, 3)
    out = method.transform(state, logits)
    for row, member in enumerate([0, 0, 1, 1, 2, 2]):
        torch.testing.assert_close(out[row], logits[row] / state.temperature[member])


def test_over_an_ensemble_one_temperature_is_fitted_to_the_mixture() -> None:
    base, some = Ensemble(SWAG(rank=2, start=0.0, snapshots=5), members=3), energy()
    method = Temperature(base, samples=2)
    state = method.fit(TemperatureState(swag_state(base.base, 3), torch.ones(3)), some, generator(1))  # type: ignore[arg-type]
    assert some.asked == [3]  # not 2: every member has a draw
    theta = base.sample(state.inner, 3, generator(1))
    expected = best_temperature(some.logits(theta).double(), some.labels)
    assert len(state.temperature.unique()) == 1
    assert float(state.temperature[0]) == pytest.approx(expected, rel=1e-6)


def test_nested_temperatures_multiply() -> None:
    some = energy()
    method = Temperature(Temperature(Point()))
    theta = {"s/x": torch.tensor([[3.0]])}
    state = method.fit(method.init(theta, generator(1)), some, generator(1))
    inner: object = state.inner
    assert isinstance(inner, TemperatureState)
    assert float(inner.temperature) == pytest.approx(
        best_temperature(some.logits(theta).double(), some.labels), rel=1e-6
    )
    assert float(state.temperature) == pytest.approx(1.0, abs=1e-4)
    logits = torch.ones(1, 2, 3)
    torch.testing.assert_close(
        method.transform(state, logits), logits / inner.temperature / state.temperature
    )


def test_who_needs_calibration_rows() -> None:
    assert ask.needs_calibration(Temperature())
    assert ask.needs_calibration(Ensemble(Temperature(SWAG())))
    assert not ask.needs_calibration(Ensemble(SWAG()))
    assert not ask.needs_calibration(Point())
