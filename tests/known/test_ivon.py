r"""IVON on a quadratic loss, through the real loop: its fixed point is the mean-field optimum in closed form.

.. math:: \bar\ell(w) = \tfrac1{2N} \sum_i (y_i - w^\top x_i)^2, \quad H = \tfrac1N X^\top X, \qquad
          m^* = (H + \delta I)^{-1} (\tfrac1N X^\top y + \delta m_0), \quad
          \sigma_j^{*2} = \frac{1}{\lambda (H_{jj} + \delta)}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from kilobayes import host, train, tree
from kilobayes.adapters import LoRA
from kilobayes.checkpoint import Checkpoint
from kilobayes.posteriors import IVON, Ensemble, Temperature
from kilobayes.random import generator
from kilobayes.types import Params, Progress

from .regression import Regression

FEATURES, ROWS, PLACE = 4, 50, "head/weight"


class Data:
    """Features of unequal widths, correlated, so that H is neither a multiple of one nor diagonal."""

    def __init__(self) -> None:
        gen = generator(3)
        mix = torch.tensor(
            [[0.5, 0.0, 0.0, 0.0], [0.2, 1.0, 0.0, 0.0], [0.0, 0.5, 1.5, 0.0], [0.1, 0.0, 0.0, 1]]
        )
        self.x = torch.randn(ROWS, FEATURES, generator=gen) @ mix.T
        self.y = self.x @ torch.tensor([1.0, -2.0, 0.5, 0.0]) + 0.5 * torch.randn(ROWS, generator=gen)

    def __len__(self) -> int:
        return ROWS

    def batch(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return {"x": self.x[rows]}, self.y[rows]


def squares(output: Any, labels: Tensor) -> Tensor:
    return 0.5 * (output.values.reshape(labels.shape) - labels).square()


def fit(
    posterior: Any, seeds: tuple[int, ...], start: Params | None = None, **changes: Any
) -> tuple[Params, train.Trained]:
    config = host.KilobayesConfig(adapter=LoRA(r=1), target_modules=["body"], modules_to_save=["head"])
    model: Any = get_peft_model(Regression(FEATURES, bias=False), config)  # type: ignore[arg-type]
    gen = generator(5)
    one = {k: torch.randn(v.shape, generator=gen) for k, v in host.read(model).items()}
    start = start or tree.member(one, torch.zeros(len(seeds), dtype=torch.long))
    save, watch = changes.pop("save", None), changes.pop("watch", None)
    settings = train.Settings(**{"epochs": 3, "batch_size": 25} | changes, seeds=seeds)
    return start, train.fit(model, Data(), squares, posterior, start, settings, save=save, watch=watch)


@pytest.mark.parametrize(("ess", "decay"), [(0.0, 0.3), (400.0, 0.05)])
def test_fixed_point_is_the_mean_field_optimum(ess: float, decay: float) -> None:
    members = 64
    method = IVON(ess, hessian=0.7, weight_decay=decay, gain=10.0, clip=0.0, beta2=0.99)
    start, trained = fit(method, tuple(range(members)), lr=0.02, epochs=300)
    assert trained.diverged == []
    data = Data()
    x, y = data.x.double().numpy(), data.y.double().numpy()
    hessian = x.T @ x / ROWS
    m0 = start[PLACE][0, 0].double().numpy()
    mean = np.linalg.solve(hessian + decay * np.eye(FEATURES), x.T @ y / ROWS + decay * m0)
    assert np.abs(mean - m0).max() > 0.5

    def close(found: Tensor, expected: np.ndarray, slack: float) -> None:
        values = found.flatten(1).double().numpy()
        error = values.std(axis=0, ddof=1) / np.sqrt(members)
        assert (error < slack).all(), "the test would not see much"
        np.testing.assert_array_less(np.abs(values.mean(axis=0) - expected), 5 * error)

    close(trained.state.average[PLACE], mean, 0.02)
    diagonal = np.diag(hessian).copy()
    close(trained.state.hessian[PLACE] / torch.as_tensor(diagonal), np.ones(FEATURES), 0.05)
    draws = method.sample(trained.state, 200 * members, generator(1))[PLACE].unflatten(0, (members, 200))
    stated = 1.0 / ((ess or ROWS) * (diagonal + decay))
    close(draws.var(dim=1) / torch.as_tensor(stated), np.ones(FEATURES), 0.05)
    # what the likelihood does not reach keeps the prior's mean, and its curvature is forgotten
    assert torch.equal(trained.state.average["body/A"], start["body/A"])
    assert float(trained.state.hessian["body/A"].abs().max()) < 0.01


def test_a_stack_is_its_members_alone() -> None:
    method = IVON(ess=0.0, beta2=0.9, weight_decay=0.1)
    start, together = fit(method, (4, 9), lr=(0.01, 0.03))
    for index, (seed, lr) in enumerate(((4, 0.01), (9, 0.03))):
        _, alone = fit(method, (seed,), start=tree.member(start, index), lr=lr)
        expected = tree.flatten_state(alone.state)
        for name, value in tree.flatten_state(together.state).items():
            torch.testing.assert_close(value[index : index + 1], expected[name], rtol=1e-5, atol=1e-7)


def test_resumes_bit_for_bit(tmp_path: Path) -> None:
    method = Temperature(Ensemble(IVON(ess=0.0, beta2=0.9, weight_decay=0.1), members=2))
    _, whole = fit(method, (1, 2), lr=0.01)

    def stop(progress: Progress, loss: Tensor) -> None:
        if progress.step == 5:
            raise KeyboardInterrupt

    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit(method, (1, 2), lr=0.01, save=Checkpoint(path, {}, seconds=0.0, resume=False), watch=stop)
    _, resumed = fit(method, (1, 2), lr=0.01, save=Checkpoint(path, {}, resume=True))
    assert not tree.first_difference(tree.flatten_state(whole.state), tree.flatten_state(resumed.state))
