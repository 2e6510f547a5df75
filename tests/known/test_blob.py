r"""BLoB's optimum on a conjugate model, through the real loop: linear regression with known noise.

With features X, noise variance s^2 and the divergence weighted by c, the bound is minimised by

.. math:: M = (X^\top X / s^2 + c\, I / \sigma_p^2)^{-1} X^\top y / s^2, \qquad
          \Omega_i^2 = c\, \bigl((X^\top X)_{ii} / s^2 + c / \sigma_p^2\bigr)^{-1}

which for c = 1 is the exact posterior's mean, and one over the diagonal of its precision.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from kilobayes import host, train
from kilobayes.adapters import LoRA
from kilobayes.optim import AdamW
from kilobayes.posteriors import BLoB, Ensemble
from kilobayes.random import generator

from .regression import Regression

FEATURES, ROWS, NOISE = 3, 40, 0.5


class Data:
    def __init__(self) -> None:
        gen = generator(3)
        self.x = torch.randn(ROWS, FEATURES, generator=gen) * torch.tensor([0.3, 1.0, 2.0]) + 0.5
        self.y = self.x @ torch.tensor([1.0, -2.0, 0.5]) + NOISE * torch.randn(ROWS, generator=gen)

    def __len__(self) -> int:
        return ROWS

    def batch(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return {"x": self.x[rows]}, self.y[rows]


def gaussian_nll(output: Any, labels: Tensor) -> Tensor:
    return (output.values.reshape(labels.shape) - labels).square() / (2 * NOISE**2)


def optimum(weight: float, prior: float) -> tuple[np.ndarray, np.ndarray]:
    data = Data()
    x = np.concatenate([data.x.double().numpy(), np.ones((ROWS, 1))], axis=1)
    precision = x.T @ x / NOISE**2
    decay = weight / prior**2
    mean = (
        np.linalg.solve(precision + decay * np.eye(len(precision)), x.T @ data.y.double().numpy()) / NOISE**2
    )
    return mean, np.sqrt(weight / (np.diag(precision) + decay))


MEMBERS = 16


@pytest.mark.parametrize(
    ("options", "weight", "batch"),
    [
        ({"cost": 0.0}, 1.0, ROWS),
        ({"cost": 0.0, "kl": 0.5, "prior": 0.5, "noise": "flipout"}, 0.5, 20),
        ({"cost": 0.05, "prior": 0.5, "cycle": 4}, 0.5, ROWS),  # 0.05 nats for each of 4 numbers, 40 rows
        ({"cost": 0.5, "kl": 2.0, "prior": 0.3, "noise": "step"}, 2.0, ROWS),
    ],
)
def test_the_optimum_of_a_conjugate_model(options: dict[str, Any], weight: float, batch: int) -> None:
    """The average over members, which differ by their noise, within 5 standard errors and 2% of AdamW's."""
    config = host.KilobayesConfig(adapter=LoRA(r=1), target_modules=["body"], modules_to_save=["head"])
    model = get_peft_model(Regression(FEATURES), config)  # type: ignore[arg-type]
    method = BLoB("head/*", epsilon=0.4, speed=1.0, **options)
    settings = train.Settings(
        lr=0.05,
        epochs=400 * batch // ROWS,
        batch_size=batch,
        seeds=tuple(range(MEMBERS)),
        optimiser=AdamW(clip=0.0, beta2=0.99),
    )
    # the head from zero: its own start is drawn from the global generator
    start = {key: value.detach()[[0] * MEMBERS].clone() for key, value in host.read(model).items()}
    start |= {key: torch.zeros_like(value) for key, value in start.items() if key.startswith("head/")}
    state = train.fit(model, Data(), gaussian_nll, Ensemble(method, MEMBERS), start, settings).state
    assert sorted(state.scale) == ["head/bias", "head/weight"]
    means, scales = (
        torch.cat([part["head/weight"].flatten(1), part["head/bias"].flatten(1)], dim=1).double().numpy()
        for part in (state.average, state.scale)
    )
    mean, scale = optimum(weight, method.prior)
    error = 5 / MEMBERS**0.5
    assert (np.abs(means.mean(axis=0) - mean) < error * means.std(axis=0, ddof=1) + 0.02 * scale).all()
    assert (np.abs(scales.mean(axis=0) - scale) < error * scales.std(axis=0, ddof=1) + 0.02 * scale).all()
    assert (error * scales.std(axis=0) < 0.3 * scale).all()  # the test is not that of a wide tolerance
    assert scale.max() > 1.5 * scale.min()
    assert np.abs(mean).max() > 3 * scale.max()
