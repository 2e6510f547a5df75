"""MonteCLoRA against closed forms, torch.distributions, brute force and Monte Carlo."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Dirichlet, kl_divergence

from kilobayes import tree
from kilobayes.posteriors import MonteCLoRA
from kilobayes.posteriors.monteclora import MonteCLoRAState, weights
from kilobayes.random import Streams, generator
from kilobayes.types import Params, Progress

PROGRESS = Progress(1, 10, 5, 40)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def made(method: MonteCLoRA, like: Params, **own: Tensor) -> MonteCLoRAState:
    """A state around given leaves; ``s`` and ``a`` fill the posterior's own of every leaf."""
    count = tree.size(like)
    leaves = method.extend(like, Streams([generator(m) for m in range(count)]))
    for key, value in leaves.items():
        if key[-1] in own:
            leaves[key] = own[key[-1]].to(value).expand(value.shape).clone()
    return MonteCLoRAState(like, leaves)


def draws(method: MonteCLoRA, state: MonteCLoRAState, count: int, key: str = "x/A") -> np.ndarray:
    """``(count, m, n)`` deviations from the mean, in float64."""
    found = method.sample(state, count, generator(11))[key].double()
    return (found - state.theta[key].double()).numpy()


def within(found: np.ndarray, expected: float | np.ndarray, errors: float = 5.0) -> None:
    """The mean over the first axis lies within some standard errors of what is expected."""
    error = found.std(axis=0, ddof=1) / math.sqrt(len(found))
    assert (np.abs(found.mean(axis=0) - expected) <= errors * error).all()


@pytest.mark.parametrize(
    "method", [MonteCLoRA(epsilon=0.7), MonteCLoRA(components=1), MonteCLoRA(mixture=True)]
)
def test_the_mean_is_the_mean(method: MonteCLoRA) -> None:
    like = {"x/A": torch.randn(1, 3, 5, generator=generator(1)), "x/B": torch.ones(1, 4, 3)}
    state = made(method, like)
    within(draws(method, state, 4000), 0.0)
    assert torch.equal(method.mean(state)["x/A"], like["x/A"])
    assert torch.equal(method.sample(state, 2, generator(1))["x/B"], torch.ones(2, 4, 3))


def fixed(method: MonteCLoRA, state: MonteCLoRAState, xi: Tensor, roots: Tensor, count: int) -> np.ndarray:
    """Draws given pi and Sigma: the numbers of both are chosen, those of z are random; ``(count, m, n)``."""
    leaf = state.theta["x/A"]
    z = torch.randn(count, leaf[0].numel(), generator=generator(8))
    noise = torch.cat([xi.expand(count, -1), roots.flatten().expand(count, -1), z], dim=1)
    who = torch.zeros(count, dtype=torch.long)
    found = method._at(tree.member(state.theta, who), tree.member(state.own, who), noise)["x/A"]
    return (found - leaf).double().numpy()


@pytest.mark.parametrize("epsilon", [0.3, 2.0])
def test_covariance_given_weights_and_scales(epsilon: float) -> None:
    """tau^2 sum pi_k^2 Sigma over a column, nothing between columns: by the definition with all z_k."""
    method = MonteCLoRA(components=3, epsilon=epsilon)
    s, a = torch.tensor([-1.0, 0.5]), torch.tensor([0.3, -0.2, 1.0])
    state = made(method, {"x/A": torch.zeros(1, 2, 3)}, s=s, a=a)
    xi, roots = torch.tensor([0.5, -1.0, 0.2, 0.0]), torch.tensor([[0.4, 1.1], [-2.0, 0.3]])
    found = fixed(method, state, xi, roots, 20000).reshape(-1, 6)
    pi = np.exp(a.numpy() + np.exp(-a.numpy() / 2) * xi[:3].numpy())
    pi /= pi.sum()
    sigma = np.exp(2 * s.numpy()) * (roots.numpy() ** 2).mean(axis=1)
    variance = np.repeat(epsilon**2 / 9 * (pi**2).sum() * sigma, 3)
    brute = np.random.default_rng(1).standard_normal((20000, 3, 2, 3)) * np.sqrt(sigma)[:, None] * epsilon / 3
    np.testing.assert_allclose(
        np.einsum("k,bkmn->bmn", pi, brute).reshape(-1, 6).var(axis=0), variance, rtol=0.06
    )
    np.testing.assert_allclose(found.var(axis=0), variance, rtol=5 * math.sqrt(2 / 20000))
    off = np.corrcoef(found.T) - np.eye(6)
    assert np.abs(off).max() < 5 / math.sqrt(20000)


def test_sigma_is_wishart() -> None:
    """Mean V and variance 2 V^2 / nu of Sigma's diagonal, told from wide leaves: a draw shares its Sigma."""
    method, s = MonteCLoRA(components=1, epsilon=1.0), torch.tensor([-0.5, 0.0, 0.7])
    state = made(method, {"x/A": torch.zeros(1, 3, 1000)}, s=s)
    rows = draws(method, state, 1500)
    sigma = (rows**2).mean(axis=2) * 3 * 1000
    v = np.exp(2 * s.double().numpy())
    within(sigma, v)
    within((sigma - v) ** 2, 2 * v**2 / 3 + 2 * v**2 * (1 + 2 / 3) / 1000, 6.0)
    assert np.abs(np.corrcoef(sigma.T) - np.eye(3)).max() < 5 / math.sqrt(1500)
    assert stats.kstest(3 * sigma[:, 0] / v[0], stats.chi2(3).cdf).pvalue > 1e-4


@pytest.mark.parametrize("alpha", [[20.0, 45.0, 150.0], [50.0, 50.0]])
def test_weights_are_about_dirichlet(alpha: list[float]) -> None:
    """The Laplace bridge has the Dirichlet's moments up to terms of the order of one over the counts."""
    a = double(*alpha).log()
    pi = weights(a, torch.randn(40000, len(alpha), generator=generator(3), dtype=torch.float64))
    exact = Dirichlet(double(*alpha))
    torch.testing.assert_close(pi.mean(dim=0), exact.mean, rtol=0.03, atol=0.0)
    torch.testing.assert_close(pi.var(dim=0), exact.variance, rtol=0.08, atol=0.0)


def test_weights_have_the_covariance_of_the_bridge() -> None:
    """In softmax's base, of logits that sum to zero: Hobbhahn et al., arXiv:2003.01227, written out."""
    alpha = double(0.4, 2.0, 30.0)
    pi = weights(alpha.log(), torch.randn(40000, 3, generator=generator(3), dtype=torch.float64))
    logits = pi.log() - pi.log().mean(dim=1, keepdim=True)
    inverse = 1 / alpha
    expected = -(inverse[:, None] + inverse) / 3 + inverse.sum() / 9 + torch.diag(inverse)
    deviations = logits - (alpha.log() - alpha.log().mean())
    within((deviations[:, :, None] * deviations[:, None, :]).numpy(), expected.numpy())
    within(deviations.numpy(), 0.0)


def test_a_mixture_keeps_the_variance_of_its_components() -> None:
    """tau^2 sum E[pi_k] v_k, and the kurtosis of a mixture; averaged components lose a factor sum pi_k^2."""
    s = torch.tensor([[-2.0], [0.0], [1.0]])
    a = torch.tensor([6.0, 5.0, 5.5])
    method = MonteCLoRA(mixture=True, components=3, epsilon=1.0)
    state = made(method, {"x/A": torch.zeros(1, 1, 4)}, s=s, a=a)
    found = draws(method, state, 60000) ** 2
    pi = torch.softmax(a.double(), 0).numpy()  # of large counts: no variance to speak of
    within(found, 1 / 12 * (pi * np.exp(2 * s[:, 0].double().numpy())).sum(), 6.0)
    # nu = 1: E w^2 = 3, and 3 of the normal
    within(found**2, 9 / 144 * (pi * np.exp(4 * s[:, 0].double().numpy())).sum(), 6.0)
    even, wide = torch.zeros(1), torch.tensor([20.0])
    averaged = MonteCLoRA(components=8, epsilon=1.0)
    shrunk = made(averaged, {"x/A": torch.zeros(1, 1, 4)}, s=even, a=wide)
    within(draws(averaged, shrunk, 20000) ** 2, 1 / 12 / 8)


def test_a_mixture_of_equal_components_is_one_component() -> None:
    """Whatever the weights: so components that share Sigma are not worth a mixture."""
    like = {"x/A": torch.zeros(1, 2, 3)}
    a = torch.tensor([0.0, 2.0, -1.0])
    mixture, single = MonteCLoRA(mixture=True, components=3), MonteCLoRA(components=1)
    ours = draws(mixture, made(mixture, like, a=a), 20000).reshape(-1)
    other = single.sample(made(single, like), 20000, generator(99))["x/A"].double().numpy().reshape(-1)
    assert stats.ks_2samp(ours, other).pvalue > 1e-4


def test_shapes_of_leaves() -> None:
    """A vector is one row; more axes count as columns; heads can be named."""
    like: Params = {
        "x/v": torch.zeros(2, 7),
        "x/t": torch.zeros(2, 3, 2, 5),
        "head/weight": torch.zeros(2, 100, 2),
    }
    method = MonteCLoRA(over="*", components=5, epsilon=1.0)
    own = method.extend(like, Streams([generator(0), generator(1)]))
    shapes = {key: tuple(value.shape) for key, value in own.items()}
    assert {k: v for k, v in shapes.items() if k[-1] == "s"} == {
        "x/v~s": (2, 1), "x/t~s": (2, 3), "head/weight~s": (2, 100)
    }  # fmt: skip
    assert {v for k, v in shapes.items() if k[-1] == "a"} == {(2, 5)}
    out = method.sample(MonteCLoRAState(like, own), 3, generator(1))
    assert {k: v.shape[1:] for k, v in out.items()} == {k: v.shape[1:] for k, v in like.items()}
    with pytest.raises(ValueError, match="leaves are called"):
        MonteCLoRA(over="*/C").extend(like, Streams([generator(0), generator(1)]))


@pytest.mark.parametrize("cooperative", [True, False])
def test_penalty_written_out(cooperative: bool) -> None:
    method = MonteCLoRA(components=2, eta=0.7, alpha0=0.5, cooperative=cooperative)
    state = made(
        method, {"x/A": torch.zeros(1, 2, 9), "y/A": torch.zeros(1, 3, 9)}, a=torch.tensor([1.0, -1.0])
    )
    state.own["x/A~s"][:] = torch.tensor([0.3, -0.1])
    alpha = torch.tensor([1.0, -1.0]).double().exp()
    weights = kl_divergence(Dirichlet(alpha), Dirichlet(double(0.5, 0.5)))
    expected = 2 * float(weights)
    for s, nu in (([0.3, -0.1], 2.0), ([0.0, 0.0, 0.0], 3.0)):
        v = np.exp(2 * np.array(s))
        excess = v - np.log(v) - 1
        gap = -float(torch.digamma(double(nu / 2))) - math.log(2 / nu)
        expected += (nu / 2 * excess + 2 / 2 * (excess + gap)).sum()
    expected *= 0.7 / 40
    if cooperative:
        expected += float((Dirichlet(alpha).variance + Dirichlet(alpha).mean ** 2).sum())
    found = method.penalty(state, state.theta | state.own, PROGRESS)
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float32))


@pytest.mark.parametrize(
    "method", [MonteCLoRA(), MonteCLoRA(mixture=True, epsilon=3.0), MonteCLoRA(noise="row", components=2)]
)
def test_the_likelihood_reaches_the_scales_the_weights_and_the_mean(method: MonteCLoRA) -> None:
    """Of the likelihood alone, no divergence: each member's gradients are its own, and not zero."""
    like = {"x/A": torch.randn(2, 3, 4, generator=generator(1)), "x/B": torch.ones(2, 2, 3)}

    def gradients(members: list[int]) -> Params:
        start = tree.member(like, torch.tensor(members))
        streams = Streams([generator(9, m) for m in members])
        theta = start | method.extend(start, streams)
        if method.mixture:
            theta["x/A~s"] = theta["x/A~s"] + torch.linspace(-1, 1, 4)[:, None]
        theta = {k: v.clone().requires_grad_() for k, v in theta.items()}
        drawn = method.perturb(method.init(theta, generator(1)), theta, 6, streams, PROGRESS)
        assert tree.size(drawn) == len(members) * (6 if method.noise == "row" else 1)
        (drawn["x/B"] @ drawn["x/A"]).sin().sum().backward()
        return {k: v.grad for k, v in theta.items() if v.grad is not None}

    together = gradients([0, 1])
    assert set(together) == {"x/A", "x/B", "x/A~s", "x/A~a"}
    for index in range(2):
        alone = gradients([index])
        for key, value in alone.items():
            assert float(value.abs().max()) > 1e-6, key
            torch.testing.assert_close(together[key][index], value[0])


def test_draws_at_a_step_are_the_draws_of_the_predictive() -> None:
    """The same law: variances of a step's draws and of the state's own draws agree."""
    method = MonteCLoRA(components=3, noise="row")
    state = made(
        method, {"x/A": torch.zeros(1, 2, 3)}, s=torch.tensor([-1.0, 0.2]), a=torch.tensor([1.0, 0.0, 2.0])
    )
    theta = state.theta | state.own
    step = method.perturb(state, theta, 20000, Streams([generator(3)]), PROGRESS)["x/A"].double().numpy()
    assert stats.ks_2samp(step[:, 0, 0], draws(method, state, 20000)[:, 0, 0]).pvalue > 1e-4
    assert stats.ks_2samp(step[:, 1, 2], draws(method, state, 20000)[:, 1, 2]).pvalue > 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"components": 0}, "components"), ({"epsilon": 0.0}, "epsilon"), ({"alpha0": math.inf}, "alpha0"),
     ({"eta": -1.0}, "eta"), ({"noise": "token"}, "noise"), ({"speed": 0.0}, "speed")],
)  # fmt: skip
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MonteCLoRA(**settings)
