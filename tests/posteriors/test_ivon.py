"""IVON by itself: the published step written out, its guards, and its draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kilobayes import tree
from kilobayes.posteriors import IVON
from kilobayes.posteriors.ivon import IVONState
from kilobayes.random import Streams, generator
from kilobayes.types import Params, Progress

ROWS = 37


def leaves(seeds: tuple[int, ...] = (1, 2)) -> Params:
    streams = Streams([generator(seed) for seed in seeds])
    return {
        "a/A": streams.normal(torch.zeros(len(seeds), 2, 3)),
        "b/bias": streams.normal(torch.zeros(len(seeds), 4)),
    }


def gradients(theta: Params, drawn: Params) -> Params:
    """Of a loss of curvature 0.3, with its minimum at 1."""
    return {key: 0.3 * (drawn[key] - 1.0) for key in theta}


def steps(
    method: IVON, theta: Params, rates: list[Any], seeds: tuple[int, ...] = (1, 2)
) -> tuple[IVONState, list[Params]]:
    """Some steps of a loop in place on ``theta``; the state, and what was drawn in each."""
    streams = Streams([generator(seed, 1) for seed in seeds])
    state, seen = method.init(theta, generator(0)), []
    for index, rate in enumerate(rates):
        progress = Progress(index + 1, len(rates), len(rates), ROWS)
        drawn = method.perturb(state, theta, 8, streams, progress)
        seen.append(tree.clone(drawn))
        found = gradients(theta, drawn)
        state = method.update(state, theta, drawn, found, torch.as_tensor(rate).expand(len(seeds)), progress)
        state = method.observe(state, theta, progress)
    return state, seen


@pytest.mark.parametrize("ess", [0.0, 500.0])
@pytest.mark.parametrize(("decay", "clip"), [(0.0, 0.0), (0.05, 0.0), (0.05, 0.3)])
def test_the_papers_step_written_out(ess: float, decay: float, clip: float) -> None:
    method = IVON(ess, hessian=0.2, weight_decay=decay, gain=4.0, clip=clip, beta1=0.8, beta2=0.7)
    theta = leaves()
    start = tree.clone(theta)
    rates = [0.02, 0.05, 0.03, 0.01, 0.04]
    state, seen = steps(method, theta, rates)
    clipped = 0
    for key, begin in start.items():
        m0 = m = begin.double().numpy()
        h, g, ess_ = np.full_like(m, 0.2), np.zeros_like(m), ess or ROWS
        for t, (rate, drawn) in enumerate(zip(rates, seen, strict=True), 1):
            variance = 1.0 / (ess_ * (h + decay))
            there = drawn[key].double().numpy()
            gradient = 0.3 * (there - 1.0)
            h_hat = gradient * (there - m) / variance
            g = 0.8 * g + 0.2 * gradient
            h = 0.7 * h + 0.3 * h_hat + 0.5 * 0.3**2 * (h - h_hat) ** 2 / (h + decay)
            ratio = (g / (1.0 - 0.8**t) + decay * (m - m0)) / (h + decay)
            if clip:
                clipped += int((np.abs(ratio) > clip).sum())
                ratio = np.clip(ratio, -clip, clip)
            m = m - 4.0 * rate * ratio
        np.testing.assert_allclose(theta[key].numpy(), m, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(state.average[key].numpy(), m, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(state.hessian[key].numpy(), h, rtol=2e-4, atol=1e-6)
        assert (h + decay > 0).all()
    assert bool(clipped) == bool(clip)
    assert state.ess.tolist() == [ess or ROWS] * 2


def test_what_is_drawn_in_a_step_has_the_posteriors_variance() -> None:
    method = IVON(ess=1e6, hessian=0.5, weight_decay=0.25)
    theta = {"a/A": torch.full((2, 20000), 3.0)}
    state = method.init(theta, generator(0))
    streams = Streams([generator(seed) for seed in (1, 2)])
    drawn = method.perturb(state, theta, 4, streams, Progress(1, 2, 2, ROWS))["a/A"]
    expected = 1.0 / (1e6 * 0.75)
    for of in drawn:
        assert abs(of.var().item() - expected) < 5 * expected * np.sqrt(2 / 20000)
        assert abs(of.mean().item() - 3.0) < 5 * np.sqrt(expected / 20000)


def test_a_precision_that_falls_stays_above_zero() -> None:
    """Estimates far below -h, ten times over: a plain average would give a negative variance at once."""
    method = IVON(ess=10.0, hessian=0.1, beta2=0.5, weight_decay=0.01)
    theta = {"a/A": torch.zeros(1, 5)}
    state = method.init(theta, generator(0))
    for step in range(1, 11):
        drawn = {"a/A": theta["a/A"] + 1.0}
        found = {"a/A": -torch.tensor([[0.0, 1e-3, 0.01, 0.1, 10.0]])}
        state = method.update(state, theta, drawn, found, torch.full((1,), 1e-6), Progress(step, 20, 20, 10))
        assert bool((state.hessian["a/A"] + 0.01 > 0).all())


def test_a_member_at_rate_zero_stays_and_does_not_spread() -> None:
    theta, alone = leaves(), leaves((2,))
    method = IVON(hessian=0.1, beta2=0.9, weight_decay=0.1)
    streams = Streams([generator(seed, 1) for seed in (1, 2)])
    state, before = method.init(theta, generator(0)), tree.clone(theta)
    for index in range(2):
        progress = Progress(index + 1, 3, 3, ROWS)
        drawn = method.perturb(state, theta, 8, streams, progress)
        found = gradients(theta, drawn)
        for value in found.values():
            value[0] = float("nan")
        rates = torch.tensor([0.0, 0.02])
        state = method.update(state, theta, drawn, found, rates, progress)
    for name, value in tree.flatten_state(state).items():
        assert bool(torch.isfinite(value).all()), name
    fresh = tree.flatten_state(method.init(before, generator(0)))
    for name, value in tree.flatten_state(state).items():
        assert torch.equal(value[:1], fresh[name][:1]), name
    assert all(torch.equal(theta[key][0], before[key][0]) for key in theta)
    steps(method, alone, [0.02, 0.02], (2,))
    for key, value in alone.items():
        assert torch.equal(theta[key][1:], value)
        assert not torch.equal(theta[key][1:], before[key][1:])


def test_draws_have_the_stated_moments_and_files_hold_two_tensors_a_leaf() -> None:
    method = IVON(ess=50.0, hessian=0.3, beta2=0.9)
    theta = leaves()
    state, _ = steps(method, theta, [0.01] * 3)
    assert {name.partition("|")[0] for name in tree.flatten_state(state)} == {"average", "hessian", "ess"}
    count = 4000
    draws = method.sample(state, 2 * count, generator(3))
    for key, average in state.average.items():
        found = draws[key].unflatten(0, (2, count))
        variance = 1.0 / (50.0 * state.hessian[key])
        assert bool(((found.mean(1) - average).abs() < 5 * (variance / count).sqrt()).all())
        assert bool(((found.var(1) - variance).abs() < 5 * variance * (2 / count) ** 0.5).all())


@pytest.mark.parametrize(
    "wrong",
    [
        {"ess": -1.0},
        {"hessian": 0.0},
        {"gain": 0.0},
        {"clip": -1.0},
        {"beta1": 1.0},
        {"weight_decay": float("nan")},
    ],
)
def test_refuses(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        IVON(**wrong)
