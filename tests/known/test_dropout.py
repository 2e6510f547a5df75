"""Dropout of a linear head's inputs under squared error is ridge regression, in closed form.

.. math:: \\mathbb{E}_z (y - \\textstyle\\sum_j w_j x_j z_j / (1 - p))^2
          = (y - w^\\top x)^2 + \\tfrac{p}{1 - p} \\sum_j w_j^2 x_j^2

(Wager et al., arXiv:1307.1493), each row under a mask of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from torch import Tensor

from kilobayes import host, train, tree
from kilobayes.adapters import LoRA
from kilobayes.optim import AdamW
from kilobayes.posteriors import Ensemble, MCDropout
from kilobayes.random import Streams, generator
from kilobayes.step import Processes, Step
from kilobayes.types import Params, Progress

from .regression import Regression

FEATURES, ROWS, P = 3, 40, 0.3
PLACE = "head/weight"


class Data:
    """Rows of a noisy line; the labels of the loop are indices of rows, since targets are real."""

    def __init__(self) -> None:
        gen = generator(3)
        scales = torch.tensor([1.0, 2.0, 0.5])
        self.x = torch.randn(ROWS, FEATURES, generator=gen) * scales
        self.y = self.x @ torch.tensor([1.0, -0.5, 2.0]) + 0.1 * torch.randn(ROWS, generator=gen)

    def __len__(self) -> int:
        return ROWS

    def batch(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return {"x": self.x[rows]}, rows

    def squares(self, output: Any, rows: Tensor) -> Tensor:
        return (output.values.reshape(rows.shape) - self.y[rows]).square()


def hosted(members: int) -> tuple[Any, Params]:
    config = host.KilobayesConfig(adapter=LoRA(r=1), target_modules=["body"], modules_to_save=["head"])
    model = get_peft_model(Regression(FEATURES, bias=False), config)  # type: ignore[arg-type]
    start = {k: torch.zeros(members, *v.shape[1:]) for k, v in host.read(model).items()}
    start[PLACE] += torch.tensor([0.7, 1.1, -0.4])
    return model, start


METHOD = MCDropout(p=P, over=PLACE)


def test_the_expected_loss_of_a_step_and_its_gradient() -> None:
    """2,000 members at one point: the mean over members and rows within 5 standard errors."""
    members, data = 2000, Data()
    model, start = hosted(members)
    theta = {k: v.requires_grad_() for k, v in start.items()}
    streams = Streams([generator(m, 1) for m in range(members)])
    step = Step(
        model, data, data.squares, METHOD, streams, (0,) * members, ROWS, 4, Processes(torch.device("cpu"))
    )
    losses, _ = step.run(METHOD.init(theta, generator(1)), theta, Progress(1, 1, 1, ROWS), "no")
    w = theta[PLACE][0, 0].detach()
    spread = (P / (1 - P) * (data.x**2).mean(0) * w**2).sum()
    expected = (data.x @ w - data.y).square().mean() + spread
    assert float(spread) > 1.0
    assert abs(float(losses.mean() - expected)) < 5 * float(losses.std()) / members**0.5
    gradients = theta[PLACE].grad
    assert gradients is not None
    slope = 2 * data.x.T @ (data.x @ w - data.y) / ROWS + 2 * P / (1 - P) * (data.x**2).mean(0) * w
    error = gradients[:, 0].std(dim=0) / members**0.5
    assert bool(((gradients[:, 0].mean(dim=0) - slope).abs() < 5 * error).all())


def test_training_ends_at_the_ridge_solution() -> None:
    members, data = 12, Data()
    model, start = hosted(members)
    settings = train.Settings(
        lr=0.05, epochs=120, batch_size=20, seeds=tuple(range(members)), optimiser=AdamW(clip=0.0)
    )
    trained = train.fit(model, data, data.squares, Ensemble(METHOD, members), start, settings)
    found = tree.member(trained.state.theta, slice(None))[PLACE][:, 0].numpy()
    x, y = data.x.double().numpy(), data.y.double().numpy()
    ridge = np.linalg.solve(x.T @ x + P / (1 - P) * np.diag((x**2).sum(0)), x.T @ y)
    plain = np.linalg.lstsq(x, y, rcond=None)[0]
    error = found.std(axis=0, ddof=1) / members**0.5
    assert (np.abs(found.mean(axis=0) - ridge) < 5 * error + 1e-3).all()
    assert (np.abs(plain - ridge) > 20 * error).all()
