"""Laplace's approximation where it is exact or written out, through hosted models and their derivatives."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from scipy.stats import multivariate_normal
from torch import Tensor, nn

from kilobayes import host, train, tree
from kilobayes.adapters import LoRA
from kilobayes.energy import ModelEnergy
from kilobayes.optim import AdamW
from kilobayes.posteriors import Laplace, linearised
from kilobayes.posteriors.gauss_newton import gauss_newton
from kilobayes.posteriors.laplace import curvature_of
from kilobayes.random import generator
from kilobayes.testing.tiny import TinyRows, TinyTask, nll, perturbed, scores, tiny_model, tiny_start
from kilobayes.types import Params

FEATURES, CLASSES, ROWS = 5, 3, 40


class Linear(nn.Module):
    """Scores of a head on an adapted linear layer, which learns unless the head does."""

    def __init__(self, learns: bool) -> None:
        super().__init__()
        self.learns = learns
        self.body = nn.Linear(FEATURES, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Any:
        hidden = self.body(x)
        return SimpleNamespace(logits=self.head(hidden if self.learns else hidden.detach()))


@dataclass(frozen=True, eq=False)
class Rows:
    """Data, their encoding and their task in one."""

    x: Tensor
    y: Tensor
    classes = ("a", "b", "c")

    @property
    def ids(self) -> list[list[int]]:
        return [[0]] * len(self.x)

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return {"x": self.x[rows]}, self.y[rows]

    def collate(self, data: Rows, rows: Tensor) -> dict[str, Tensor]:
        return data.batch(rows)[0]

    def labels(self, data: Rows, rows: Tensor) -> Tensor:
        return data.y[rows]

    def within(self, model: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def readout(self, output: Any) -> Tensor:
        return output.logits


def hosted(trained: list[str]) -> tuple[Any, Params, Rows, ModelEnergy]:
    config = host.KilobayesConfig(
        adapter=LoRA(r=2, alpha=3.0), target_modules=["body"], modules_to_save=trained
    )
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        model: Any = get_peft_model(Linear(not trained), config)  # type: ignore[arg-type]
    gen = generator(5)
    theta = {k: torch.randn(v.shape, generator=gen) for k, v in host.read(model).items()}
    x = torch.randn(ROWS, FEATURES, generator=gen)
    data = Rows(x, torch.multinomial((x[:, :3] * 2).softmax(-1), 1, generator=gen)[:, 0])
    return model, theta, data, ModelEnergy(model, data, data, batch_size=7)  # type: ignore[arg-type]


@pytest.mark.parametrize(("precision", "width"), [(0.7, 0.5), (3.0, 2.0)])
def test_gaussian_likelihood_is_exact(precision: float, width: float) -> None:
    """Scores are linear in LoRA's B: with a Gaussian likelihood evidence and posterior are in closed form."""
    model, theta, data, energy = hosted([])
    base = model.get_base_model()
    down = data.x.double() @ theta["body/A"][0].double().T
    weight = base.head.weight.detach().double()
    scale = 3.0 / 2
    jacobian = scale * torch.einsum("co,nr->ncor", weight, down).flatten(2).flatten(0, 1).numpy()
    center = theta["body/B"].double().flatten().numpy()
    offset = energy.logits(theta)[0].double().flatten().numpy()
    rng = np.random.default_rng(1)
    y = offset + jacobian @ rng.normal(size=8) + width * rng.normal(size=len(offset))
    exact = multivariate_normal.logpdf(
        y, offset, jacobian @ jacobian.T / precision + width**2 * np.eye(len(y))
    )
    covariance = np.linalg.inv(jacobian.T @ jacobian / width**2 + precision * np.eye(8))
    best = center + covariance @ jacobian.T @ (y - offset) / width**2
    at = theta | {"body/B": torch.tensor(best, dtype=torch.float32).view_as(theta["body/B"])}

    def combine(scores: Tensor) -> Tensor:
        return torch.eye(CLASSES).expand(len(scores), -1, -1) / width

    found = gauss_newton("full", energy.jacobians(at, ["body/B"], combine), ROWS, 10, generator(0))
    residual = y - energy.logits(at)[0].double().flatten().numpy()
    likelihood = -0.5 * (residual**2).sum() / width**2 - len(y) * np.log(width * np.sqrt(2 * np.pi))
    distance = float(((best - center) ** 2).sum())
    assert likelihood + linearised.evidence(found, distance, precision) == pytest.approx(exact, abs=1e-3)
    for batch in energy.jacobians(at, ["body/B"], lambda s: torch.eye(CLASSES).expand(len(s), -1, -1)):
        own = jacobian.reshape(ROWS, CLASSES, 8)[batch.rows]
        result = found.covariances(batch.gradients, torch.tensor([precision]))[0].numpy()
        np.testing.assert_allclose(result, own @ covariance @ own.transpose(0, 2, 1), rtol=1e-4, atol=1e-5)


def test_a_trained_head_is_logistic_regression() -> None:
    """Through the real loop: the maximum a posteriori of that prior, and the curvature there written out."""
    model, theta, data, energy = hosted(["head"])
    method = Laplace(over="head", structure="full", prior=2.0)
    settings = train.Settings(lr=0.1, epochs=800, batch_size=ROWS, seeds=(0,), optimiser=AdamW(clip=0.0))
    trained = train.fit(model, data, nll, method, theta, settings)
    state = method.fit(trained.state, energy, generator(1))
    final = trained.state.theta
    hidden = _hidden(model, final, data.x)
    p = energy.logits(final)[0].double().softmax(-1).numpy()
    design = np.zeros((ROWS, CLASSES, 15))  # head/bias, head/weight: the order of keys
    for c in range(CLASSES):
        design[:, c, c] = 1.0
        design[:, c, 3 + 4 * c : 7 + 4 * c] = hidden
    hessian = np.stack([np.diag(row) - np.outer(row, row) for row in p])
    matrix = np.einsum("ncp,ncd,ndq->pq", design, hessian, design) + 2.0 * np.eye(15)
    found = curvature_of(state, 0)
    eye = torch.eye(15)[None]
    leaves = {"head/bias": eye[..., :3], "head/weight": eye[..., 3:].reshape(1, 15, 3, 4)}
    dense = found.covariances(leaves, torch.tensor([2.0]))[0, 0].numpy()
    np.testing.assert_allclose(dense, np.linalg.inv(matrix), rtol=1e-3, atol=1e-5)
    # at the maximum the prior's pull and the likelihood's cancel
    moved = (
        torch.cat([(final[k] - theta[k]).flatten() for k in ("head/bias", "head/weight")]).double().numpy()
    )
    gap = np.einsum("ncp,nc->p", design, p - np.eye(CLASSES)[data.y.numpy()])
    np.testing.assert_allclose(gap, -2.0 * moved, atol=5e-3)
    assert np.abs(moved).max() > 0.3


def _hidden(model: Any, theta: Params, x: Tensor) -> np.ndarray:
    seen: list[Tensor] = []
    handle = model.get_base_model().body.register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        host.install(model, host.build(model, theta))
        model(x=x)
        host.install(model, None)
    handle.remove()
    return seen[0].double().numpy()


def tiny() -> tuple[Any, Params, TinyRows]:
    model = tiny_model(LoRA(r=3))
    return model, perturbed(tiny_start(model, [4])), TinyRows.make(11, seed=3)


def test_derivatives_are_those_of_each_row_alone() -> None:
    """Every leaf of a tiny BERT, row by row without padding and without a stack, by plain backward passes."""
    model, theta, rows = tiny()
    energy: Any = ModelEnergy(model, TinyTask(), rows, batch_size=4)  # type: ignore[arg-type]
    for batch in energy.jacobians(theta, sorted(theta), linearised.differences):
        for at, row in enumerate(batch.rows.tolist()):
            leaves = {k: v.clone().requires_grad_() for k, v in theta.items()}
            out = scores(model, leaves, TinyRows([rows.ids[row]], rows.labels[row : row + 1]))[0, 0]
            torch.testing.assert_close(batch.logits[at], out.detach(), atol=1e-5, rtol=1e-4)
            for c in (0, 1):
                wanted = torch.autograd.grad(out[c] - out[2], list(leaves.values()), retain_graph=True)
                for key, value in zip(leaves, wanted, strict=True):
                    torch.testing.assert_close(batch.gradients[key][at, c], value[0], atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_batches_and_padding_do_not_enter(structure: str) -> None:
    model, theta, rows = tiny()
    over = "*.0.*query/*" if structure == "full" else "*"
    states = []
    for size in (1, 11):
        energy: Any = ModelEnergy(model, TinyTask(), rows, batch_size=size)  # type: ignore[arg-type]
        method = Laplace(over=over, structure=structure, prior=5.0, samples=3)
        state = method.fit(method.init(theta, generator(1)), energy, generator(2))
        states.append((method.logits(state, energy, 3, generator(3)), state))
    for values in zip(states[0][1].values.values(), states[1][1].values.values(), strict=True):
        torch.testing.assert_close(*values, rtol=1e-3, atol=1e-4 * float(values[0].max()))
    torch.testing.assert_close(states[0][0], states[1][0], atol=2e-3, rtol=1e-3)
    assert tree.flatten_state(states[0][1]).keys() == tree.flatten_state(states[1][1]).keys()
