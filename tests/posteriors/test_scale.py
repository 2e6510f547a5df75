from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kilobayes import tree
from kilobayes.posteriors import SWAG, Ensemble, Point, Scale, Temperature, ask
from kilobayes.posteriors.point import PointState
from kilobayes.posteriors.scale import ScaleState, mixture_nll, search
from kilobayes.posteriors.temperature import TemperatureState, best_temperature
from kilobayes.random import generator
from kilobayes.testing import check_posterior
from kilobayes.testing.posteriors import ToyEnergy, observed, walk
from kilobayes.types import Params, Progress


@dataclass(frozen=True)
class Gaussian:
    """Independent weights around a point, of a given width: what is to be rescaled."""

    width: float = 1.0

    def init(self, theta: Params, gen: torch.Generator) -> PointState:
        return PointState(tree.clone(theta), {})

    def observe(self, state: PointState, theta: Params, progress: Progress) -> PointState:
        return state

    def sample(self, state: PointState, n: int, gen: torch.Generator) -> Params:
        who = tree.spread(tree.size(state.theta), n)
        return {
            k: v[who] + self.width * torch.randn(n, *v.shape[1:], generator=gen)
            for k, v in sorted(state.theta.items())
        }

    def mean(self, state: PointState) -> Params:
        return state.theta

    def support(self, state: PointState) -> None:
        return None


@dataclass(frozen=True, eq=False)
class Linear:
    """Scores ``x w`` of 3 classes; how many draws were asked for is written down."""

    x: Tensor
    labels: Tensor
    asked: list[int]

    @property
    def train(self) -> Any:
        return self

    def logits(self, theta: Params) -> Tensor:
        self.asked.append(tree.size(theta))
        return torch.einsum("nf,sfc->snc", self.x, theta["a/w"])


CENTER = torch.randn(1, 2, 3, generator=generator(41))


def simulated(width: float, rows: int = 3000) -> Linear:
    """Each row's label comes from weights drawn for it, so the Gaussian of this width predicts best."""
    gen = generator(int(100 * width))
    x = torch.randn(rows, 2, generator=gen) * torch.exp(torch.randn(rows, 1, generator=gen))
    w = CENTER + width * torch.randn(rows, 2, 3, generator=gen)
    labels = torch.multinomial(torch.einsum("nf,nfc->nc", x, w).softmax(-1), 1, generator=gen)[:, 0]
    return Linear(x, labels, [])


def nll(energy: Linear, width: float, c: float, tempered: bool = False, samples: int = 80) -> float:
    theta = Gaussian(width).sample(PointState({"a/w": CENTER}, {}), samples, generator(5))
    scaled = {"a/w": CENTER + math.sqrt(c) * (theta["a/w"] - CENTER)}
    return mixture_nll(energy.logits(scaled).double(), energy.labels, tempered)


@pytest.mark.parametrize(("width", "c"), [(0.5, 4.0), (1.0, 1.0), (1.5, 0.25), (0.6, 10.0)])
def test_finds_by_how_much_a_covariance_is_wrong(width: float, c: float) -> None:
    """Error of the maximum likelihood in log c: one over the root of rows times the curvature."""
    energy = simulated(width * math.sqrt(c))
    method = Scale(Gaussian(width), tempered=False, samples=80)
    state = method.fit(method.init({"a/w": CENTER}, generator(0)), energy, generator(1))  # type: ignore[arg-type]
    h = 0.7
    values = [nll(energy, width, c * math.exp(d)) for d in (-h, 0.0, h)]
    error = math.sqrt(h**2 / (values[0] - 2 * values[1] + values[2]) / len(energy.labels))
    assert error < 0.3
    assert abs(math.log(float(state.factor[0]) / c)) < 5 * error
    assert energy.asked[:3] == [1, 80, 80]  # predictions of the calibration rows: the mean, and draws
    assert len(energy.asked) - 3 <= (4 if c < 4 else 5)


def test_finds_the_width_and_the_temperature_together() -> None:
    """Scores are also too large by 2; the width alone would make up for some of that."""
    energy = simulated(1.0, 1000)
    double = Linear(2 * energy.x, energy.labels, [])
    found = {}
    for tempered in (True, False):
        method = Temperature(Scale(Gaussian(0.5), tempered=tempered, samples=30), samples=30)
        state = method.fit(method.init({"a/w": CENTER}, generator(0)), double, generator(1))  # type: ignore[arg-type]
        inner: Any = state.inner
        found[tempered] = float(inner.factor[0]), float(state.temperature[0])
    assert abs(math.log(found[True][0] / 4)) < 0.7
    assert abs(math.log(found[True][1] / 2)) < 0.15
    assert nll(double, 0.5, found[True][0], True, 30) < nll(double, 0.5, found[False][0], True, 30)


def computed(value: Callable[[float], float]) -> tuple[float, list[float]]:
    """What the search finds where scores are a function of the root of c, and the loss is its square."""
    asked: list[float] = []

    def at(root: float) -> Tensor:
        asked.append(root)
        return torch.tensor([value(root)], dtype=torch.float64)

    return search(at, lambda found: float(found.square().sum())), asked


@pytest.mark.parametrize("best", [0.04, 0.6, 1.0, 1.9, 3.1, 12.0])
def test_search_is_exact_where_scores_are_parabolas_and_short(best: float) -> None:
    found, asked = computed(lambda root: (root - best) * (root + 20))
    assert found == pytest.approx(best, abs=2e-2)
    further = max(0, math.ceil(math.log2(best / 1.875)))  # the last of 8 cells
    assert len(asked) == len(set(asked)) == 4 + further - (best == 1.0)  # which is among the first three
    assert asked[:3] == [0.0, 1.0, 2.0]


def test_search_prefers_none_to_the_mean_and_stays_at_one_where_nothing_changes() -> None:
    assert computed(lambda root: 1.0)[0] == 1.0
    assert computed(lambda root: 1 + root)[0] == 0.0
    assert computed(lambda root: 40 - root)[0] == 32.0  # the bound
    assert computed(lambda root: float(root != 1))[0] == 1.0  # what was computed counts, not the parabola


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tempered", [False, True])
def test_never_worse_than_the_base_or_its_mean_on_the_rows_of_the_fit(seed: int, tempered: bool) -> None:
    gen = generator(seed, 2)
    energy = Linear(2 * torch.randn(25, 2, generator=gen), torch.randint(3, (25,), generator=gen), [])
    method = Scale(Gaussian(0.8), tempered=tempered, samples=7)
    state = method.fit(method.init({"a/w": CENTER}, generator(0)), energy, generator(5))  # type: ignore[arg-type]
    best = nll(energy, 0.8, float(state.factor[0]), tempered, 7)
    assert best <= min(nll(energy, 0.8, 1.0, tempered, 7), nll(energy, 0.8, 0.0, tempered, 7)) + 1e-9


def swag(members: int = 1) -> Any:
    return observed(SWAG(rank=2, start=0.0, snapshots=9), walk(list(range(members))))


@pytest.mark.parametrize("c", [0.0, 0.3, 1.0, 7.0])
def test_draws_are_those_of_the_base_moved_from_their_own_mean(c: float) -> None:
    base = SWAG(rank=2, start=0.0, snapshots=9)
    method, inner = Scale(base), swag(2)
    state = ScaleState(inner, torch.tensor([c, 2.0]))
    drawn, plain = (m.sample(s, 6, generator(3)) for m, s in ((method, state), (base, inner)))
    center = tree.member(base.mean(inner), tree.spread(2, 6))
    for key, value in drawn.items():
        expected = center[key][:3] + math.sqrt(c) * (plain[key][:3] - center[key][:3])
        torch.testing.assert_close(value[:3], expected)
        torch.testing.assert_close(value[3:] - center[key][3:], math.sqrt(2) * (plain[key] - center[key])[3:])
        if c == 0:
            assert torch.equal(value[:3], center[key][:3])
        if c == 1:
            assert torch.equal(value[:3], plain[key][:3])
    assert method.support(state) is None
    assert method.support(ScaleState(inner, torch.zeros(2))) == 2


def test_pooling_of_an_ensemble_lies_between_the_geometric_and_the_arithmetic_mean() -> None:
    method = Scale(Ensemble(Point(), members=3))
    inner = method.base.init(walk([1, 2, 3])[0], generator(1))
    logits = 3 * torch.randn(3, 5, 4, generator=generator(2), dtype=torch.float64)
    p = logits.softmax(-1).numpy()
    geometric = np.exp(np.log(p).mean(0))
    pooled = {
        c: method.transform(ScaleState(inner, torch.full((3,), c)), logits).softmax(-1).mean(0).numpy()
        for c in (0.0, 1.0)
    }
    np.testing.assert_allclose(pooled[0.0], geometric / geometric.sum(-1, keepdims=True), rtol=1e-12)
    np.testing.assert_allclose(pooled[1.0], p.mean(0), rtol=1e-12)
    assert method.support(ScaleState(inner, torch.zeros(3))) == 3  # the mean of scores is over all of them
    theta = method.sample(ScaleState(inner, torch.zeros(3)), 3, generator(1))
    assert not tree.first_difference(theta, inner.theta)


def test_scores_are_pooled_within_members_of_an_ensemble_around() -> None:
    method = Ensemble(Scale(SWAG(), of="scores"), members=2)
    logits = torch.randn(5, 2, 3, generator=generator(2))
    out = method.transform(ScaleState(swag(2), torch.tensor([0.0, 1.0])), logits)
    torch.testing.assert_close(out[:3], logits[:3].mean(0).expand(3, 2, 3))
    assert torch.equal(out[3:], logits[3:])
    across = Scale(Ensemble(SWAG(), members=2), of="scores")
    out = across.transform(ScaleState(swag(2), torch.zeros(2)), logits)
    torch.testing.assert_close(out, logits.mean(0).expand(5, 2, 3))


def test_a_temperature_goes_inside_or_outside() -> None:
    logits = torch.randn(4, 6, 3, generator=generator(2))
    inner, factor, temperature = swag(), torch.tensor([0.4]), torch.tensor([2.5])
    outside = Temperature(Scale(SWAG(), of="scores"))
    inside = Scale(Temperature(SWAG()), of="scores")
    one = outside.transform(TemperatureState(ScaleState(inner, factor), temperature), logits)
    other = inside.transform(ScaleState(TemperatureState(inner, temperature), factor), logits)
    torch.testing.assert_close(one, other)
    expected = (logits.mean(0) + math.sqrt(0.4) * (logits - logits.mean(0))) / 2.5
    torch.testing.assert_close(one, expected)


@pytest.mark.parametrize("seed", range(4))
def test_around_a_temperature_the_width_is_the_best_at_that_temperature(seed: int) -> None:
    energy = simulated(1.0, 60)
    method = Scale(Temperature(Gaussian(0.8), samples=9), samples=9)  # tempered, but not once more
    state = method.fit(method.init({"a/w": CENTER}, generator(0)), energy, generator(seed))  # type: ignore[arg-type]
    assert isinstance(state.inner, TemperatureState)
    gen = generator(seed)
    first = Gaussian(0.8).sample(state.inner.inner, 9, gen)  # type: ignore[arg-type]
    t = best_temperature(energy.logits(first).double(), energy.labels)
    assert float(state.inner.temperature) == pytest.approx(t, rel=1e-6)
    second = Gaussian(0.8).sample(state.inner.inner, 9, gen)  # type: ignore[arg-type]

    def value(c: float) -> float:
        theta = {"a/w": CENTER + math.sqrt(c) * (second["a/w"] - CENTER)}
        return mixture_nll(energy.logits(theta).double() / t, energy.labels, False)

    assert value(float(state.factor[0])) <= min(value(c) for c in (0.0, 0.25, 1.0, 4.0)) + 1e-6


@pytest.mark.parametrize(
    "method",
    [
        Scale(SWAG(rank=3), tempered=False, samples=4),
        Scale(Ensemble(members=3)),
        Scale(Ensemble(SWAG(rank=2), members=2), samples=6),
        Temperature(Scale(SWAG(rank=3))),
        Scale(SWAG(rank=0), of="weights"),
    ],
)
def test_other_compositions(method: Any) -> None:
    check_posterior(method)


def test_one_width_for_an_ensemble_or_one_for_each_member() -> None:
    energy, trajectory = ToyEnergy.make(), walk([3, 4])
    base = SWAG(rank=2, start=0.0, snapshots=9)
    around = Scale(Ensemble(base, members=2), tempered=False)
    inside = Ensemble(Scale(base, tempered=False), members=2)
    one, each = (m.fit(observed(m, trajectory), energy, generator(1)) for m in (around, inside))
    assert one.factor.shape == each.factor.shape == (2,)
    assert len(one.factor.unique()) == 1
    alone = Scale(base, tempered=False)
    gen = generator(1)
    for k in range(2):  # each member's is what it would be by itself
        state = ScaleState(tree.state_member(each.inner, k), torch.ones(1))
        assert torch.equal(alone.fit(state, energy, gen).factor, each.factor[k : k + 1])


def test_settings() -> None:
    assert ask.needs_calibration(Ensemble(Scale(SWAG())))
    with pytest.raises(ValueError, match="of must be"):
        Scale(of="both")
    with pytest.raises(ValueError, match="samples"):
        Scale(samples=0)
