"""The Laplace posterior of LoRA-XS in closed form: scores are linear in R, so it is known exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from scipy.stats import multivariate_normal
from torch import Tensor

from kilobayes import host, train
from kilobayes.adapters import LoRAXS
from kilobayes.energy import ModelEnergy
from kilobayes.optim import AdamW
from kilobayes.posteriors import Laplace, linearised
from kilobayes.posteriors.gauss_newton import gauss_newton
from kilobayes.posteriors.laplace import curvature_of
from kilobayes.random import generator
from kilobayes.testing.tiny import nll
from kilobayes.types import Params

from .test_laplace import CLASSES, FEATURES, ROWS, Linear, Rows

R, SCALE = 3, 5.0 / 3


def hosted() -> tuple[Any, Params, Rows, ModelEnergy, np.ndarray]:
    """A softmax classifier over an adapted layer, its data, and the derivatives ``(N, C, 9)`` in R."""
    config = host.KilobayesConfig(adapter=LoRAXS(r=R, alpha=5.0), target_modules=["body"])
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        model: Any = get_peft_model(Linear(True), config)  # type: ignore[arg-type]
    gen = generator(5)
    theta = {k: torch.randn(v.shape, generator=gen) for k, v in host.read(model).items()}
    assert {k: tuple(v.shape) for k, v in theta.items()} == {"body/R": (1, R, R)}
    x = torch.randn(ROWS, FEATURES, generator=gen)
    data = Rows(x, torch.multinomial((x[:, :CLASSES] * 2).softmax(-1), 1, generator=gen)[:, 0])
    base = model.get_base_model()
    weight, head = (layer.weight.detach().double().numpy() for layer in (base.body.base_layer, base.head))
    u, s, vt = np.linalg.svd(weight)
    signs = np.sign(u[np.abs(u).argmax(axis=0), np.arange(4)])[:R]
    up, down = head @ (u[:, :R] * signs), x.double().numpy() @ (vt[:R].T * signs) * s[:R]
    jacobian = SCALE * np.einsum("ci,nj->ncij", up, down).reshape(ROWS, CLASSES, R * R)
    return model, theta, data, ModelEnergy(model, data, data, batch_size=7), jacobian  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", [0.3, 4.0])
def test_trained_under_a_prior_the_posterior_is_the_closed_form(precision: float) -> None:
    """Mode, covariance and predictive of logistic regression in R, and drawn weights that obey them."""
    model, theta, data, energy, jacobian = hosted()
    method = Laplace(over="*/R", structure="full", prior=precision, samples=20_000)
    settings = train.Settings(lr=0.02, epochs=300, batch_size=ROWS, seeds=(0,), optimiser=AdamW(clip=0.0))
    done = train.fit(model, data, nll, method, theta, settings)
    state = method.fit(done.state, energy, generator(1))
    mode = state.theta["body/R"].double().flatten().numpy()
    scores = energy.logits(state.theta)[0].double()
    p = scores.softmax(-1).numpy()
    gap = np.einsum("ncp,nc->p", jacobian, p - np.eye(CLASSES)[data.y.numpy()])
    start = theta["body/R"].double().flatten().numpy()
    np.testing.assert_allclose(gap, -precision * (mode - start), atol=5e-3)  # the gradient vanishes
    assert np.abs(mode - start).max() > 0.1
    hessian = np.stack([np.diag(row) - np.outer(row, row) for row in p])
    covariance = np.linalg.inv(
        np.einsum("ncp,ncd,ndq->pq", jacobian, hessian, jacobian) + precision * np.eye(R * R)
    )
    identity = {"body/R": torch.eye(R * R).reshape(1, R * R, R, R)}
    found = curvature_of(state, 0).covariances(identity, torch.tensor([precision]))[0, 0].numpy()
    np.testing.assert_allclose(found, covariance, rtol=1e-3, atol=1e-5)
    # linear: what a drawn R predicts is what its linearisation predicts, to rounding
    drawn = method.sample(state, 50, generator(3))
    step = drawn["body/R"].double().flatten(1).numpy() - mode
    wanted = scores.numpy() + np.einsum("ncp,sp->snc", jacobian, step)
    np.testing.assert_allclose(energy.logits(drawn).numpy(), wanted, atol=2e-4)
    less = np.array([[1.0, 0.0, -1.0], [0.0, 1.0, -1.0]])
    draws = method.logits(state, energy, 5, generator(4))[:, 11].double().numpy() @ less.T
    exact = less @ jacobian[11] @ covariance @ jacobian[11].T @ less.T
    variances = np.diag(exact)
    error = np.sqrt((exact**2 + np.outer(variances, variances)) / len(draws))
    assert (np.abs(np.cov(draws.T) - exact) < 5 * error).all()
    assert (np.abs(draws.mean(0) - less @ scores.numpy()[11]) < 5 * np.sqrt(variances / len(draws))).all()


@pytest.mark.parametrize(("precision", "width"), [(0.7, 0.5), (3.0, 2.0)])
def test_gaussian_evidence_is_exact(precision: float, width: float) -> None:
    """Under a Gaussian likelihood: the marginal likelihood of a linear model, by SciPy."""
    _, theta, _, energy, jacobian = hosted()
    design = jacobian.reshape(-1, R * R)
    center = theta["body/R"].double().flatten().numpy()
    offset = energy.logits(theta)[0].double().flatten().numpy()
    rng = np.random.default_rng(1)
    y = offset + design @ rng.normal(size=R * R) + width * rng.normal(size=len(offset))
    exact = multivariate_normal.logpdf(y, offset, design @ design.T / precision + width**2 * np.eye(len(y)))
    covariance = np.linalg.inv(design.T @ design / width**2 + precision * np.eye(R * R))
    best = center + covariance @ design.T @ (y - offset) / width**2
    at = {"body/R": torch.tensor(best, dtype=torch.float32).view(1, R, R)}

    def combine(scores: Tensor) -> Tensor:
        return torch.eye(CLASSES).expand(len(scores), -1, -1) / width

    found = gauss_newton("full", energy.jacobians(at, ["body/R"], combine), ROWS, 10, generator(0))
    residual = y - energy.logits(at)[0].double().flatten().numpy()
    likelihood = -0.5 * (residual**2).sum() / width**2 - len(y) * np.log(width * np.sqrt(2 * np.pi))
    distance = float(((best - center) ** 2).sum())
    assert likelihood + linearised.evidence(found, distance, precision) == pytest.approx(exact, abs=2e-3)
