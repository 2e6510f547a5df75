"""RoseLoRA against the published schedule, NumPy's own pruning, and what a file and a merge must keep."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kilobayes.adapters import LoRA, RoseLoRA
from kilobayes.random import Streams, generator
from kilobayes.types import Params, Progress, Site

SITES = [
    Site("one", 40, 60, weight=lambda: torch.empty(60, 40, device="meta")),
    Site("two", 60, 30, weight=lambda: torch.empty(30, 60, device="meta")),
]


def leaves(method: RoseLoRA, stack: int = 2, seed: int = 0) -> Params:
    """A stack in which nothing is zero, with a trained head."""
    gen = generator(seed)
    theta = method.init(SITES, {}, stack, gen)
    theta |= {"head/weight": torch.zeros(stack, 3, 60)}
    return {key: value + torch.randn(value.shape, generator=gen) for key, value in theta.items()}


def lines(theta: Params) -> dict[str, np.ndarray]:
    """Rows of A and columns of B, last."""
    found = {k: v.mT if k.endswith("/B") else v for k, v in theta.items() if k[-2:] in ("/A", "/B")}
    return {k: v.numpy().copy() for k, v in found.items()}


def pruned(method: RoseLoRA, steps: int = 20, stack: int = 2) -> tuple[Params, Params]:
    """Weights and memo after steps with random gradients and random moves of all weights."""
    theta, memo, gen = leaves(method, stack), {}, generator(5)
    for step in range(1, steps + 1):
        gradients = {k: torch.randn(v.shape, generator=gen) for k, v in theta.items()}
        for key, value in theta.items():
            value.sub_(0.1 * gradients[key])
        memo = method.project(theta, gradients, memo, Progress(step, steps, 5, 100))
    return theta, memo


def test_published_schedule() -> None:
    method = RoseLoRA(keep=0.05, start=3 / 25, end=20 / 25)
    found = [method.share(t, 25) for t in (1, 2, 3, 4, 5, 6, 19, 20, 25)]
    by_hand = [0.05 + 0.95 * (1 - (t - 3) / 17) ** 3 for t in (4, 5, 6, 19)]
    assert found == pytest.approx([1, 1, 1, *by_hand, 0.05, 0.05])
    assert [round(v, 3) for v in found[3:6]] == [0.842, 0.703, 0.581]


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.0), (1.0, 1.0), (0.4, 0.4), (0.0, 1.0)])
def test_schedules_at_their_ends(start: float, end: float) -> None:
    shares = [RoseLoRA(keep=0.2, start=start, end=end).share(t, 10) for t in range(1, 11)]
    assert shares[-1] == 0.2
    assert all(0.2 <= v <= 1.0 for v in shares)
    assert shares == sorted(shares, reverse=True)


COUNTS = [(0.07, 100, 7), (0.05, 768, 39), (0.05, 3, 1), (0.99, 9, 9)]


@pytest.mark.parametrize(("keep", "width", "count"), COUNTS)
def test_counts(keep: float, width: int, count: int) -> None:
    """0.07 times 100 is 7.000000000000001 in floating point."""
    method = RoseLoRA(r=2, keep=keep, start=0.0, end=0.0)
    theta = {"s/A": torch.randn(3, 2, width, generator=generator(1))}
    method.project(theta, {"s/A": torch.ones(3, 2, width)}, {}, Progress(1, 4, 1, 9))
    assert (theta["s/A"] != 0).sum(-1).unique().tolist() == [count]


def test_every_step_equals_numpy() -> None:
    """Sensitivities smoothed and sorted in NumPy, free to grow again until the end of the schedule."""
    method, steps = RoseLoRA(r=3, keep=0.1, start=0.15, end=0.7, beta=0.6), 20
    theta, memo, gen = leaves(method), {}, generator(3)
    smoothed = {k: np.zeros(v.shape) for k, v in lines(theta).items()}
    grown = 0
    frozen: dict[str, np.ndarray] = {}
    for step in range(1, steps + 1):
        gradients = {k: torch.randn(v.shape, generator=gen) for k, v in theta.items()}
        before = lines(theta)
        for key, value in theta.items():
            value.sub_(0.5 * gradients[key])
        moved, slopes = lines(theta), lines(gradients)
        memo = method.project(theta, gradients, memo, Progress(step, steps, 5, 100))
        share = method.share(step, steps)
        for key, after in lines(theta).items():
            smoothed[key] = 0.6 * smoothed[key] + 0.4 * np.abs(moved[key] * slopes[key])
            count = math.ceil(share * after.shape[-1] - 1e-9)
            kept = np.zeros(after.shape, bool)
            np.put_along_axis(kept, np.argsort(-smoothed[key], axis=-1)[..., :count], True, axis=-1)
            kept = frozen.get(key, kept)
            np.testing.assert_array_equal(after, np.where(kept, moved[key], 0))
            assert (np.count_nonzero(after, axis=-1) == count).all()
            grown += int(((before[key] == 0) & (after != 0)).sum())
            if share == 0.1:
                frozen.setdefault(key, kept)
    assert grown > 20


def test_heads_are_left_alone() -> None:
    method = RoseLoRA(r=3, start=0.0, end=0.0)
    theta = leaves(method)
    before = theta["head/weight"].clone()
    memo = method.project(theta, dict(theta), {}, Progress(1, 1, 1, 1))
    assert torch.equal(theta["head/weight"], before)
    assert set(memo) == {"one/A", "one/B", "two/A", "two/B"}


def test_without_sensitivity_magnitude_decides() -> None:
    """B of zero gives A no gradient: published code prunes nothing then."""
    method = RoseLoRA(r=1, keep=0.5, start=0.0, end=0.0)
    theta = {"s/A": torch.tensor([[[0.1, -4.0, 3.0, 0.2]]]), "s/B": torch.zeros(1, 4, 1)}
    zeros = {key: torch.zeros_like(value) for key, value in theta.items()}
    method.project(theta, zeros, {}, Progress(1, 4, 1, 9))
    assert theta["s/A"].tolist() == [[[0.0, -4.0, 3.0, 0.0]]]
    assert not theta["s/B"].any()
    theta["s/A"] = torch.tensor([[[0.1, -4.0, 3.0, 0.2]]])
    some = {"s/A": torch.tensor([[[1e-9, 0.0, 0.0, 0.0]]]), "s/B": torch.zeros(1, 4, 1)}
    method.project(theta, some, {}, Progress(1, 4, 1, 9))
    assert theta["s/A"].tolist() == [[[pytest.approx(0.1), -4.0, 0.0, 0.0]]]


def test_equal_sensitivities() -> None:
    """Thresholds at the k-th value keep all that are equal to it; here it is exactly so many."""
    method, theta = RoseLoRA(keep=0.1, start=0.0, end=0.0), {"s/A": torch.ones(1, 2, 50)}
    method.project(theta, {"s/A": torch.ones(1, 2, 50)}, {}, Progress(1, 4, 1, 9))
    assert (theta["s/A"] != 0).sum(-1).tolist() == [[5, 5]]


def test_shares_close_to_one() -> None:
    """Published code asks for the 0th smallest value of a row here, and stops."""
    method = RoseLoRA(keep=0.05, start=0.1, end=1.0)
    assert 0.99 < method.share(101, 1000) < 1.0
    theta = leaves(method)
    method.project(theta, dict(theta), {}, Progress(101, 1000, 10, 9))
    assert all((v != 0).all() for v in lines(theta).values())


def test_a_diverged_member_is_alone() -> None:
    method, bad = RoseLoRA(r=2, keep=0.1), {"s/A": torch.tensor([[[float("nan")] * 30] * 2])}
    good = {"s/A": torch.randn(1, 2, 30, generator=generator(2))}
    start = torch.randn(2, 2, 30, generator=generator(1))
    alone, together = {"s/A": start[:1].clone()}, {"s/A": start.clone()}
    one: Params = {}
    both: Params = {}
    for step in range(1, 11):
        progress = Progress(step, 10, 5, 9)
        one = method.project(alone, good, one, progress)
        both = method.project(together, {"s/A": torch.cat([good["s/A"], bad["s/A"]])}, both, progress)
    assert torch.equal(together["s/A"][:1], alone["s/A"])
    assert torch.equal(both["s/A"][:1], one["s/A"])
    assert torch.isfinite(both["s/A"]).all()
    assert (together["s/A"][1] != 0).sum(-1).tolist() == [3, 3]  # the largest: nothing else is known
    largest = start[1, 0].abs().topk(3).indices.tolist()
    assert together["s/A"][1, 0].nonzero()[:, 0].tolist() == sorted(largest)


def test_clamp() -> None:
    theta, _ = pruned(RoseLoRA(clamp=0.003, alpha=8.0))
    assert max(np.abs(v).max() for v in lines(theta).values()) == pytest.approx(0.003)
    assert theta["head/weight"].abs().max() > 1


def test_draws_keep_the_support() -> None:
    method = RoseLoRA(r=3, keep=0.1)
    theta, _ = pruned(method)
    draws = {key: torch.randn(value.shape, generator=generator(1)) for key, value in theta.items()}
    kept = method.restrict(draws, theta, None)
    for key, value in kept.items():
        expected = draws[key] if key == "head/weight" else torch.where(theta[key] == 0, 0.0, draws[key])
        assert torch.equal(value, expected)


def test_draws_around_a_denser_average() -> None:
    """An average of weights from before the end of the schedule: its largest numbers stay."""
    method = RoseLoRA(r=1, keep=0.25)
    around = {"s/A": torch.tensor([[[0.1, -2.0, 0.0, 0.3, 0.0, 0.0, 1.0, 0.2]]])}
    kept = method.restrict({"s/A": torch.full((1, 1, 8), 5.0)}, around, None)
    assert kept["s/A"].tolist() == [[[0, 5, 0, 0, 0, 0, 5, 0]]]


def test_draws_while_training() -> None:
    """Zeros stay, their gradients are those of the draw; before pruning starts nothing is restricted."""
    method = RoseLoRA(r=1, start=0.1)
    theta = {"s/A": torch.tensor([[[0.0, 2.0]]], requires_grad=True)}
    drawn = {"s/A": 3.0 * theta["s/A"] + 1.0}
    assert method.restrict(drawn, theta, Progress(1, 100, 5, 9)) is drawn
    kept = method.restrict(drawn, theta, Progress(50, 100, 5, 9))["s/A"]
    assert kept.tolist() == [[[0.0, 7.0]]]
    kept.sum().backward()
    assert theta["s/A"].grad is not None
    assert theta["s/A"].grad.tolist() == [[[3.0, 3.0]]]


def test_density() -> None:
    method = RoseLoRA(r=8, keep=0.05)
    square = Site("s", 1000, 1000, weight=lambda: torch.empty(0))
    assert method.density(square) == pytest.approx(8 * 0.05**2)
    assert RoseLoRA(r=500, keep=0.5).density(square) == 1.0
    method = RoseLoRA(r=4, keep=0.1)
    theta, _ = pruned(method, stack=3)
    for site in SITES:
        operator = method.build({leaf: theta[f"{site.name}/{leaf}"] for leaf in "AB"}, {}, site)
        update = torch.bmm(operator.B, operator.A)
        share = (update != 0).double().mean(dim=(1, 2))
        assert (share <= method.density(site) + 1e-12).all()
        assert (share > 0.5 * method.density(site)).all()
        weight = torch.randn(site.d_out, site.d_in, generator=generator(4))
        untouched = (operator.B[0] != 0).double() @ (operator.A[0] != 0).double() == 0
        assert untouched.double().mean() >= 1 - method.density(site)
        assert torch.equal((weight + update[0])[untouched], weight[untouched])


def test_build_is_that_of_lora() -> None:
    method = RoseLoRA(r=4, alpha=10.0, dropout=0.3)
    theta, same = leaves(method), LoRA(r=4, alpha=10.0, dropout=0.3)
    parts = {leaf: theta[f"one/{leaf}"] for leaf in "AB"}
    ours, theirs = method.build(parts, {}, SITES[0]), same.build(parts, {}, SITES[0])
    assert torch.equal(ours.A, theirs.A)
    assert torch.equal(ours.B, 2.5 * parts["B"])
    streams = [Streams([generator(3, m) for m in range(2)]) for _ in range(2)]
    assert torch.equal(method.drop(theta, streams[0])["one/A"], same.drop(theta, streams[1])["one/A"])


WRONG = [{"r": 0}, {"keep": 0.0}, {"keep": 1.1}, {"start": 0.9}, {"end": 1.1}, {"beta": 1.0}, {"clamp": -1.0}]


@pytest.mark.parametrize("wrong", WRONG)
def test_refusals(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="found"):
        RoseLoRA(**wrong)  # type: ignore[arg-type]
