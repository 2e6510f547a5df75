from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kilobayes import optim
from kilobayes.random import Streams, generator
from kilobayes.types import Params

SHAPES = {"a/A": (3, 5), "a/B": (7, 3), "head/bias": (4,)}


def start(seeds: list[int]) -> Params:
    streams = Streams([generator(seed) for seed in seeds])
    return {key: streams.normal(torch.empty(len(seeds), *shape)) for key, shape in SHAPES.items()}


def gradients(seeds: list[int], step: int) -> Params:
    """Of very different sizes, so that some are clipped and some are not."""
    streams = Streams([generator(seed, step, 1) for seed in seeds])
    size = 10.0 ** (step % 4 - 2)
    return {key: size * streams.normal(torch.empty(len(seeds), *shape)) for key, shape in SHAPES.items()}


def run(
    config: optim.AdamW, seeds: list[int], rates: list[float], groups: dict[str, float], steps: int = 20
) -> Params:
    theta = start(seeds)
    state = optim.init(theta)
    for step in range(1, steps + 1):
        optim.step(config, state, theta, gradients(seeds, step), torch.tensor(rates), step, groups)
    return theta


@pytest.mark.parametrize("clip", [0.0, 0.3])
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_one_member_equals_torch(clip: float, weight_decay: float) -> None:
    config = optim.AdamW(weight_decay=weight_decay, beta1=0.8, beta2=0.95, epsilon=1e-7, clip=clip)
    groups = {"a/B": 16.0}
    ours = run(config, [3], [0.02], groups)
    theirs = {key: value[0].clone().requires_grad_() for key, value in start([3]).items()}
    sets = [{"params": [v], "lr": 0.02 * groups.get(k, 1.0)} for k, v in theirs.items()]
    adamw = torch.optim.AdamW(sets, betas=(0.8, 0.95), eps=1e-7, weight_decay=weight_decay)
    for step in range(1, 21):
        for key, value in gradients([3], step).items():
            theirs[key].grad = value[0].clone()
        if clip:
            torch.nn.utils.clip_grad_norm_(theirs.values(), clip)
        adamw.step()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key][0], value.detach(), rtol=1e-6, atol=2e-6)


def test_members_equal_separate_runs() -> None:
    config = optim.AdamW(weight_decay=0.1, clip=0.5)
    seeds, rates = [1, 2, 5], [0.1, 0.003, 0.03]
    together = run(config, seeds, rates, {})
    for index, (seed, rate) in enumerate(zip(seeds, rates)):
        alone = run(config, [seed], [rate], {})
        for key in SHAPES:
            torch.testing.assert_close(together[key][index], alone[key][0], rtol=1e-6, atol=1e-6)


def test_a_dead_member_stays_put_and_disturbs_nobody() -> None:
    config, seeds = optim.AdamW(weight_decay=0.3, clip=1.0), [1, 2]
    theta = start(seeds)
    state = optim.init(theta)
    first = gradients(seeds, 1)
    optim.step(config, state, theta, first, torch.tensor([0.1, 0.1]), 1, {})
    frozen = {
        key: (v[1].clone(), state.first[key][1].clone(), state.second[key][1].clone())
        for key, v in theta.items()
    }
    for step in range(2, 6):
        some = gradients(seeds, step)
        for value in some.values():
            value[1] = float("nan")
        optim.step(config, state, theta, some, torch.tensor([0.1, 0.0]), step, {"a/A": 3.0})
    for key, (value, one, two) in frozen.items():
        assert torch.equal(theta[key][1], value)
        assert torch.equal(state.first[key][1], one)
        assert torch.equal(state.second[key][1], two)
    alone = start([1])
    single = optim.init(alone)
    for step in range(1, 6):
        optim.step(
            config,
            single,
            alone,
            gradients([1], step),
            torch.tensor([0.1]),
            step,
            {} if step < 2 else {"a/A": 3.0},
        )
    for key in SHAPES:
        torch.testing.assert_close(theta[key][0], alone[key][0], rtol=1e-6, atol=1e-6)


def test_norms_are_per_member_over_all_leaves() -> None:
    some = gradients([4, 5], 2)
    for index in range(2):
        expected = math.sqrt(sum(float(v[index].double().square().sum()) for v in some.values()))
        assert float(optim.norms(some)[index]) == pytest.approx(expected, rel=1e-6)


def test_a_zero_gradient_moves_nothing() -> None:
    theta = start([1])
    before = {k: v.clone() for k, v in theta.items()}
    zeros: dict[str, Tensor] = {k: torch.zeros_like(v) for k, v in theta.items()}
    norm = optim.step(optim.AdamW(), optim.init(theta), theta, zeros, torch.tensor([0.1]), 1, {})
    assert float(norm) == 0.0
    assert all(torch.equal(theta[k], before[k]) for k in theta)


def test_schedule() -> None:
    assert optim.linear(0.05, 0.2) == pytest.approx(0.25)
    assert optim.linear(0.2, 0.2) == pytest.approx(1.0)
    assert optim.linear(0.6, 0.2) == pytest.approx(0.5)
    assert optim.linear(1.0, 0.2) == 0.0
    assert optim.linear(0.3, 0.0) == pytest.approx(0.7)
    assert optim.linear(1.0, 1.0) == 0.0
