"""Posteriors with a closed form, through the real loop: a hosted linear model of given features.

The model is odd but real: a linear map that carries the adapter and whose output counts nothing, and a linear
head that is trained whole. So the head's training is a multinomial logistic regression, and scores are linear
in its weights.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from scipy.optimize import minimize
from scipy.special import log_softmax
from torch import Tensor, nn

from kilobayes import host, train, tree
from kilobayes.adapters import LoRA
from kilobayes.optim import AdamW
from kilobayes.posteriors import SWAG, Ensemble, Point
from kilobayes.posteriors.swag import SWAGState
from kilobayes.random import generator
from kilobayes.testing.tiny import nll
from kilobayes.types import Params, Progress

FEATURES, CLASSES, ROWS = 4, 3, 60


class Regression(nn.Module):
    """Scores of a linear head, plus nothing times an adapted layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, FEATURES)
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(logits=self.head(x + 0.0 * self.body(x)))


class Data:
    def __init__(self) -> None:
        gen = generator(3)
        self.x = torch.randn(ROWS, FEATURES, generator=gen)
        truth = torch.randn(CLASSES, FEATURES, generator=gen)
        self.labels = torch.multinomial((self.x @ truth.T).softmax(-1), 1, generator=gen)[:, 0]

    def __len__(self) -> int:
        return ROWS

    def batch(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return {"x": self.x[rows]}, self.labels[rows]


def hosted() -> tuple[Any, Params]:
    config = host.KilobayesConfig(adapter=LoRA(r=1), target_modules=["body"], modules_to_save=["head"])
    model = get_peft_model(Regression(), config)  # type: ignore[arg-type]
    gen = generator(5)
    return model, {k: torch.randn(v.shape, generator=gen) for k, v in host.read(model).items()}


def fit(posterior: Any, members: int = 1, **changes: Any) -> tuple[Any, Params, train.Trained]:
    model, start = hosted()
    start = tree.member(start, torch.zeros(members, dtype=torch.long))
    plain = {"lr": 0.1, "epochs": 1200, "batch_size": ROWS, "optimiser": AdamW(clip=0.0)}
    settings = train.Settings(**plain | changes, seeds=tuple(range(members)))
    return model, start, train.fit(model, Data(), nll, posterior, start, settings)


@pytest.mark.parametrize("precision", [0.3, 4.0])
def test_map_is_the_penalised_logistic_regression(precision: float) -> None:
    """Equal to the minimum that L-BFGS finds of the written-out objective, prior centred at the start."""
    _, start, trained = fit(Point(precision))
    data = Data()
    x, y = data.x.double().numpy(), data.labels.numpy()
    center = np.concatenate(
        [start["head/weight"][0].double().numpy(), start["head/bias"][0].double().numpy()[:, None]], 1
    )

    def objective(flat: np.ndarray) -> float:
        w = flat.reshape(center.shape)
        scores = log_softmax(x @ w[:, :-1].T + w[:, -1], axis=1)
        return float(-scores[np.arange(ROWS), y].mean() + precision / (2 * ROWS) * ((w - center) ** 2).sum())

    best = minimize(
        objective, np.zeros(center.size), method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-9}
    )
    expected = best.x.reshape(center.shape)
    found = torch.cat(
        [trained.state.theta["head/weight"][0], trained.state.theta["head/bias"][0][:, None]], 1
    )
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-4)
    assert np.abs(expected - center).max() > 0.3
    # what the likelihood does not reach stays where the prior is centred
    assert torch.equal(trained.state.theta["body/A"], start["body/A"])


def test_ensemble_of_a_convex_problem_is_one_point() -> None:
    """Members with orders of their own, mini-batches apart, meet at the one minimum."""
    _, start, trained = fit(Ensemble(Point(4.0), members=3), 3, batch_size=30, epochs=400)
    theta = trained.state.theta
    assert float((theta["head/weight"] - theta["head/weight"][:1]).abs().max()) < 0.01  # the start is 1 away
    assert float((theta["head/weight"] - start["head/weight"]).abs().max()) > 0.3


class Recorder(SWAG):
    """SWAG that also writes down the weights it sees."""

    def observe(self, state: SWAGState, theta: Params, progress: Progress) -> SWAGState:
        SEEN.append(tree.flat(tree.clone(theta)).double().numpy())
        return super().observe(state, theta, progress)


SEEN: list[np.ndarray] = []


def fitted() -> tuple[Any, Recorder, train.Trained, np.ndarray]:
    """A real trajectory of mini-batches, and the snapshots that the definition takes from it."""
    SEEN.clear()
    method = Recorder(rank=5, start=0.4, snapshots=12, rate_held=1.0)
    model, _, trained = fit(Ensemble(method, members=2), members=2, epochs=10, batch_size=10)
    assert len(SEEN) == 60
    due = [step for step in range(1, 61) if step > 24 and (step - 24) % 3 == 0]  # 12 of the 36 last steps
    return model, method, trained, np.stack([SEEN[step - 1] for step in due])


def test_swag_moments_of_a_real_trajectory() -> None:
    _, _, trained, snapshots = fitted()
    state = trained.state
    assert snapshots.shape[0] == 12
    assert state.count.tolist() == [12.0, 12.0]
    np.testing.assert_allclose(tree.flat(state.average).numpy(), snapshots.mean(axis=0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(
        tree.flat(state.squares).numpy() / 12, snapshots.var(axis=0), rtol=1e-6, atol=1e-9
    )
    running = np.cumsum(snapshots, axis=0) / np.arange(1, 13)[:, None, None]
    held = (snapshots - running)[-5:]
    kept = torch.cat([v.flatten(2) for v in state.deviations.values()], dim=2)
    np.testing.assert_allclose(kept.numpy(), held.transpose(1, 0, 2), rtol=1e-5, atol=1e-7)


def test_scores_of_swag_have_the_gaussian_moments() -> None:
    """Scores are linear in the head, so their mean and variance over draws are known exactly."""
    model, method, trained, snapshots = fitted()
    count = 3000
    theta = method.sample(trained.state, 2 * count, generator(7))
    x = torch.tensor([[1.0, -2.0, 0.5, 3.0]])
    with torch.no_grad():
        host.install(model, host.build(model, theta))
        found = (
            model(x=x.repeat(2 * count, 1)).logits.double().numpy()
        )  # block s of the rows goes to member s
        host.install(model, None)
    like = tree.member(theta, 0)
    design = []
    for c in range(CLASSES):
        row = {key: torch.zeros_like(value) for key, value in like.items()}
        row["head/weight"][0, c] = x[0]
        row["head/bias"][0, c] = 1.0
        design.append(tree.flat(row)[0].double().numpy())
    linear = np.stack(design)
    running = np.cumsum(snapshots, axis=0) / np.arange(1, 13)[:, None, None]
    for member in range(2):
        held = (snapshots - running)[-5:, member]
        covariance = np.diag(snapshots[:, member].var(axis=0)) / 2 + held.T @ held / (2 * 4)
        mean, variance = linear @ snapshots[:, member].mean(axis=0), np.diag(linear @ covariance @ linear.T)
        ours = found[member * count : (member + 1) * count]
        assert (np.abs(ours.mean(axis=0) - mean) < 5 * np.sqrt(variance / count)).all()
        assert (np.abs(ours.var(axis=0, ddof=1) - variance) < 5 * variance * np.sqrt(2 / count)).all()
