"""Divergences against torch.distributions, brute force and Monte Carlo, at small and large counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Dirichlet, Gamma, Normal, Wishart, kl_divergence

from kilobayes.posteriors import divergences
from kilobayes.random import generator


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def within(found: np.ndarray, expected: float, errors: float = 5.0) -> None:
    """The mean lies within some standard errors of what is expected."""
    assert abs(found.mean() - expected) <= errors * found.std(ddof=1) / math.sqrt(len(found)) + 1e-12


@pytest.mark.parametrize("prior", [0.1, 1.0, 7.0])
@pytest.mark.parametrize("alpha", [[1.5] * 8, [0.02, 3.0], [900.0, 0.5, 40.0], [1e6, 2e6, 3e6]])
def test_dirichlet_divergence_is_that_of_torch(alpha: list[float], prior: float) -> None:
    found = divergences.dirichlet(double(*alpha).log(), prior)
    expected = kl_divergence(Dirichlet(double(*alpha)), Dirichlet(torch.full_like(double(*alpha), prior)))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-7)
    assert found >= 0


def test_dirichlet_divergence_of_the_sign_that_others_have_wrong() -> None:
    """Eight components at 1.5 against a prior of 0.1: 9.39 nats; the published code says -28.59."""
    assert float(divergences.dirichlet(double(*[1.5] * 8).log(), 0.1)) == pytest.approx(9.39, abs=0.005)


@pytest.mark.parametrize("log_alpha", [-8.0, 0.0, 5.0, 20.0, 30.0])
@pytest.mark.parametrize("count", [1, 2, 24, 64])
def test_dirichlet_divergence_of_many_components_and_large_counts(count: int, log_alpha: float) -> None:
    """Finite and non-negative where exp(lgamma) overflows, and zero at equality."""
    a = torch.full((count,), log_alpha, dtype=torch.float64, requires_grad=True)
    found = divergences.dirichlet(a, 1.0)
    found.backward()
    assert a.grad is not None
    assert torch.isfinite(found)
    assert torch.isfinite(a.grad).all()
    assert found.detach() >= 0
    same = divergences.dirichlet(a.detach(), math.exp(log_alpha))
    assert abs(float(same)) <= 1e-12 * max(1.0, count * math.exp(log_alpha) * abs(log_alpha))


@pytest.mark.parametrize("degrees", [1.0, 3.0, 8.0])
def test_wishart_divergence_is_that_of_its_diagonal(degrees: float) -> None:
    """The entries W_ii are independent Gamma(nu / 2, rate nu / (2 v))."""
    s = double(-1.3, 0.0, 0.4)
    rate = degrees / 2 / (2 * s).exp()
    expected = kl_divergence(
        Gamma(torch.full_like(s, degrees / 2), rate),
        Gamma(torch.full_like(s, degrees / 2), torch.full_like(s, degrees / 2)),
    )
    torch.testing.assert_close(divergences.wishart(s, torch.full_like(s, degrees)), expected)


def test_wishart_divergence_is_that_of_the_whole_matrix() -> None:
    """Monte Carlo over torch's Wishart densities with nu = m = 3 and the scale V / nu."""
    s, nu = double(-0.3, 0.2, 0.5), 3.0
    scale = torch.diag((2 * s).exp()) / nu
    ours = Wishart(double(nu)[0], covariance_matrix=scale, validate_args=False)
    prior = Wishart(
        double(nu)[0], covariance_matrix=torch.eye(3, dtype=torch.float64) / nu, validate_args=False
    )
    gen, count = generator(4), 20000
    factors = torch.randn(count, 3, 3, generator=gen, dtype=torch.float64) @ scale.sqrt()
    w = factors.mT @ factors
    ratio = (ours.log_prob(w) - prior.log_prob(w)).numpy()
    within(ratio, float(divergences.wishart(s, torch.full_like(s, nu)).sum()))


@pytest.mark.parametrize("degrees", [1, 3, 64])
def test_normal_divergence_is_its_expectation(degrees: int) -> None:
    s = 0.3
    w = torch.randn(20000, degrees, generator=generator(5), dtype=torch.float64).square().mean(dim=1)
    each = kl_divergence(
        Normal(double(0.0), (w.sqrt() * math.exp(s))[:, None]), Normal(double(0.0), double(1.0))
    )
    within(each[:, 0].numpy(), float(divergences.normal(double(s), double(degrees))))


@pytest.mark.parametrize("degrees", [1.0, 8.0, 64.0])
def test_the_two_priors_of_the_scales_agree(degrees: float) -> None:
    """Both are least at s = 0: with the published scale one pulls to 0, the other to -log(nu)/2."""
    s = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    nu = torch.full((3,), degrees, dtype=torch.float64)
    for divergence in (divergences.wishart, divergences.normal):
        (gradient,) = torch.autograd.grad(divergence(s, nu).sum(), s)
        assert (gradient.abs() < 1e-12).all()
        assert (divergence(s + 0.1, nu) > divergence(s, nu)).all()
        assert (divergence(s - 0.1, nu) > divergence(s, nu)).all()
    assert (divergences.wishart(s.detach(), nu) == 0).all()


@pytest.mark.parametrize("alpha", [[2.0, 2.0, 2.0], [0.1, 5.0], [1e5] * 64])
def test_collisions_are_the_second_moment_of_the_dirichlet(alpha: list[float]) -> None:
    rows = np.random.default_rng(2).dirichlet(alpha, 20000)
    within((rows**2).sum(axis=1), float(divergences.collision(double(*alpha).log())), 6.0)


def test_collisions_of_huge_counts_do_not_overflow() -> None:
    assert float(divergences.collision(torch.full((64,), 800.0, dtype=torch.float64))) == pytest.approx(
        1 / 64
    )
