from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kilobayes.posteriors import Point
from kilobayes.random import generator
from kilobayes.types import Params, Progress

GEN = generator(0)
PROGRESS = Progress(3, 10, 5, 37)


def leaves(seed: int) -> Params:
    gen = generator(seed)
    return {"s/A": torch.randn(2, 3, 4, generator=gen), "s/B": torch.randn(2, 5, generator=gen)}


def quadratic(theta: Params) -> Tensor:
    """Nats ``(2, 2)`` of two rows."""
    total = sum(value.flatten(1).sin().sum(dim=1) for value in theta.values())
    return torch.stack([total, 3 * total], dim=1)  # type: ignore[operator]


def test_maximum_likelihood_adds_nothing() -> None:
    theta = leaves(1)
    found = Point().penalty(Point().init(theta, GEN), leaves(2), PROGRESS)
    assert torch.equal(found, torch.zeros(2))


def test_map_is_the_closed_form_with_its_gradient() -> None:
    center, theta = leaves(1), {k: v.requires_grad_() for k, v in leaves(2).items()}
    method = Point(prior_precision=2.5)
    state = method.init(center, GEN)
    loss = quadratic(theta).mean(dim=1) + method.penalty(state, theta, PROGRESS)
    for member in range(2):
        squares = sum(
            float((theta[k][member] - center[k][member]).detach().double().square().sum()) for k in theta
        )
        expected = float(quadratic(theta)[member].detach().mean()) + 2.5 / (2 * 37) * squares
        assert float(loss[member].detach()) == pytest.approx(expected, rel=1e-6)
    loss.sum().backward()
    for key, value in theta.items():
        expected_gradient = 2 * value.detach().cos() + 2.5 / 37 * (value.detach() - center[key])
        torch.testing.assert_close(value.grad, expected_gradient, rtol=1e-5, atol=1e-6)


def test_the_prior_is_centred_where_the_method_starts() -> None:
    center = leaves(1)
    method = Point(prior_precision=4.0)
    state = method.init(center, GEN)
    theta = {k: v.clone().requires_grad_() for k, v in center.items()}
    loss = method.penalty(state, theta, PROGRESS)
    loss.sum().backward()
    assert float(loss.detach().abs().max()) == 0.0
    assert all(not value.grad.any() for value in theta.values())  # type: ignore[union-attr]


def test_observes_the_last_step_only() -> None:
    method = Point(1.0)
    state = method.init(leaves(1), GEN)
    assert method.observe(state, leaves(2), Progress(9, 10, 5, 7)) is state
    last = method.observe(state, leaves(2), Progress(10, 10, 5, 7))
    assert torch.equal(last.theta["s/A"], leaves(2)["s/A"])
    assert torch.equal(last.center["s/A"], leaves(1)["s/A"])
    assert method.support(last) == 2


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
def test_no_such_precision(wrong: float) -> None:
    with pytest.raises(ValueError, match="prior_precision"):
        Point(wrong)
