from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kilobayes import cli, store, tree
from kilobayes.commands.thin import size
from kilobayes.errors import KilobayesError
from kilobayes.posteriors import SWA, SWAG, TFB, Ensemble, Point, Scale, Temperature, ask
from kilobayes.posteriors.point import PointState
from kilobayes.posteriors.scale import ScaleState
from kilobayes.posteriors.temperature import TemperatureState
from kilobayes.posteriors.tfb import TFBState
from kilobayes.random import generator
from kilobayes.testing.posteriors import observed, walk
from kilobayes.thin import drawn, lowered, stored, thin
from kilobayes.types import Params

from . import small

BASE = SWAG(rank=6, start=0.0, snapshots=9)


def swag(members: int = 2) -> Any:
    return observed(BASE, walk(list(range(members)), 12))


def columns(state: Any, member: int) -> np.ndarray:
    """A member's deviations ``(P, rank)``."""
    return torch.cat([v[member].flatten(1) for v in state.deviations.values()], dim=1).double().numpy().T


def covariance(deviations: np.ndarray) -> np.ndarray:
    return deviations @ deviations.T / (2 * (deviations.shape[1] - 1))


@pytest.mark.parametrize("rank", [2, 3, 5])
def test_a_lower_rank_is_the_best_there_is(rank: int) -> None:
    """Against numpy: the largest singular values of the whole covariance, and nothing of the rest."""
    state = swag()
    method, lower = lowered(BASE, state, rank)
    assert repr(method) == repr(SWAG(rank=rank, start=0.0, snapshots=9))
    for member in range(2):
        whole, found = covariance(columns(state, member)), covariance(columns(lower, member))
        values, vectors = np.linalg.eigh(whole)
        best = (vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].T
        np.testing.assert_allclose(found, best, atol=1e-6 * values[-1])
        assert np.linalg.matrix_rank(found, tol=1e-5 * values[-1]) == rank
    for name in ("average", "squares"):
        assert not tree.first_difference(getattr(lower, name), getattr(state, name))


def test_draws_have_the_covariance_of_the_lower_rank() -> None:
    state = swag(1)
    method, lower = lowered(BASE, state, 2)
    count = 20_000
    drawn_ = tree.flat(method.sample(lower, count, generator(3))).double().numpy()
    order = list(state.average)
    assert order == sorted(order)
    variance = tree.flat(state.squares)[0].double().numpy() / 9 / 2
    expected = np.diag(variance) + covariance(columns(lower, 0))
    found = np.cov(drawn_.T)
    error = np.sqrt((np.outer(np.diag(expected), np.diag(expected)) + expected**2) / count)
    assert (np.abs(found - expected) < 5 * error).all()


def test_the_diagonal_has_the_whole_variance() -> None:
    state = swag(1)
    method, diagonal = lowered(BASE, state, 0)
    draws = tree.flat(method.sample(diagonal, 20_000, generator(3)))
    expected = tree.flat(state.squares)[0] / 9
    assert bool(((draws.var(0) - expected).abs() < 5 * expected * math.sqrt(2 / 20_000)).all())


def test_the_largest_rank_that_fits() -> None:
    method, state = Temperature(Ensemble(BASE, members=2)), TemperatureState(swag(), torch.tensor([2.0, 2.0]))
    limit = stored(*lowered(method, state, 4)) + 10
    found, smaller = thin(method, state, limit, generator(1))
    assert repr(found) == repr(Temperature(Ensemble(SWAG(rank=4, start=0.0, snapshots=9), members=2)))
    assert stored(found, smaller) <= limit < stored(*lowered(method, state, 5))
    assert isinstance(smaller, TemperatureState)
    assert torch.equal(smaller.temperature, state.temperature)
    least, state_ = thin(method, state, stored(*lowered(method, state, 0)), generator(1))
    assert next(p for p in ask.chain(least) if isinstance(p, SWAG)).rank == 0
    assert least.support(state_) is None
    same, untouched = thin(method, state, stored(method, state), generator(1), "samples")
    assert same is method
    assert untouched is state


def test_draws_become_an_ensemble_that_predicts_as_they_did() -> None:
    scaled = ScaleState(swag(), torch.tensor([0.5, 0.5]))
    method: Any = Temperature(Scale(Ensemble(BASE, members=2)))
    state = TemperatureState(scaled, torch.tensor([1.5, 1.5]))
    limit = stored(*drawn(method, state, 5, generator(1))) + 10
    found, smaller = thin(method, state, limit, generator(1), "samples")
    assert repr(found) == repr(Temperature(Ensemble(Point(), members=5)))
    assert found.support(smaller) == ask.members(found) == 5
    assert stored(found, smaller) <= limit
    expected = method.sample(state, 5, generator(1))  # the scale of weights is in them
    assert not tree.first_difference(found.sample(smaller, 5, generator(9)), expected)
    logits = torch.randn(5, 3, 4, generator=generator(2))
    assert torch.equal(ask.transform(found, smaller, logits), ask.transform(method, state, logits))


def test_members_keep_their_own_temperatures_and_scores_their_scale() -> None:
    own = Ensemble(Temperature(BASE), members=2)
    state: Any = TemperatureState(swag(), torch.tensor([1.0, 3.0]))
    method, smaller = drawn(own, state, 5, generator(1))
    assert repr(method) == repr(Temperature(Ensemble(Point(), members=5)))
    assert smaller.temperature.tolist() == [1.0, 1.0, 1.0, 3.0, 3.0]
    logits = torch.randn(5, 3, 4, generator=generator(2))
    assert torch.equal(ask.transform(method, smaller, logits), ask.transform(own, state, logits))
    pooled = Scale(Ensemble(SWA(), members=4), samples=3)
    points = PointState(walk([1, 2, 3, 4])[0], {})
    method, smaller = drawn(pooled, ScaleState(_swa(points.theta), torch.full((4,), 0.2)), 3, generator(1))
    assert repr(method) == repr(Scale(Ensemble(Point(), members=3), samples=3))
    assert smaller.factor.tolist() == pytest.approx([0.2] * 3)
    logits = torch.randn(3, 3, 4, generator=generator(2))
    center = logits.mean(0)
    torch.testing.assert_close(
        ask.transform(method, smaller, logits), center + math.sqrt(0.2) * (logits - center)
    )


def _swa(theta: Params) -> Any:
    return observed(SWA(start=0.0, snapshots=2), [theta, theta])


def test_one_draw_is_the_mean_and_less_is_refused() -> None:
    method, state = Ensemble(BASE, members=2), swag()
    one = stored(*drawn(method, state, 1, generator(1)))
    found, smaller = thin(method, state, one, generator(1))
    assert repr(found) == "Point(prior_precision=0.0)"
    assert not tree.first_difference(smaller.theta, tree.member(state.average, 0))
    with pytest.raises(KilobayesError, match=f"{one - 1:,} bytes do not hold one member") as told:
        thin(method, state, one - 1, generator(1))
    assert told.value.remedy == f"as in --bytes {one}"
    with pytest.raises(KilobayesError, match="diagonal"):
        thin(method, state, one, generator(1), "rank")


def test_fewer_members_of_an_ensemble_of_points() -> None:
    method, theta = Ensemble(Point(), members=4), walk([1, 2, 3, 4])[0]
    state = PointState(theta, {})
    limit = (stored(method, state) + stored(*drawn(method, state, 3, generator(1)))) // 2
    found, smaller = thin(method, state, limit, generator(1))
    assert repr(found) == repr(Ensemble(Point(), members=3))
    assert not tree.first_difference(smaller.theta, tree.member(theta, slice(0, 3)))
    with pytest.raises(KilobayesError, match="no rank"):
        thin(method, state, limit, generator(1), "rank")


def test_any_continuous_posterior() -> None:
    theta = {
        "s/A": torch.randn(1, 2, 5, generator=generator(1)),
        "s/B": torch.randn(1, 4, 2, generator=generator(2)),
    }
    method, state = TFB(), TFBState(PointState(theta, {}), torch.tensor([0.3]))
    found, smaller = drawn(method, state, 3, generator(1))
    assert not tree.first_difference(smaller.theta, method.sample(state, 3, generator(1)))
    assert found.support(smaller) == 3


class Own(Point):
    """Predicts without weights."""

    def logits(self, state: Any, energy: Any, n: int, gen: torch.Generator) -> torch.Tensor:
        return torch.zeros(n, 1, 2)


def test_a_width_of_zero_leaves_points() -> None:
    state = ScaleState(swag(), torch.zeros(2))
    method: Any = Scale(Ensemble(BASE, members=2))
    found, smaller = thin(method, state, stored(method, state) - 1, generator(1))
    assert repr(found) == repr(Ensemble(Point(), members=2))
    assert not tree.first_difference(smaller.theta, state.inner.average)  # type: ignore[attr-defined]


def test_what_cannot_become_draws() -> None:
    theta = walk([1])[0]
    with pytest.raises(KilobayesError, match="its own way"):
        drawn(Own(), Own().init(theta, generator(1)), 2, generator(1))
    apart = Ensemble(Scale(BASE, of="scores"), members=2)
    with pytest.raises(KilobayesError, match="each member"):
        drawn(apart, ScaleState(swag(), torch.ones(2)), 2, generator(1))
    with pytest.raises(KilobayesError, match="thin by"):
        thin(BASE, swag(), 1, generator(1), "halves")


@pytest.mark.parametrize(
    ("text", "count"),
    [("400kB", 400_000), ("1.5 MiB", 1_572_864), ("20000", 20_000), ("3k", 3000), ("2KIB", 2048), ("7b", 7)],
)
def test_sizes(text: str, count: int) -> None:
    assert size(text) == count


@pytest.mark.parametrize("text", ["", "kB", "-3", "4 bits", "1e3", "0", "3..4"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(KilobayesError, match="no size"):
        size(text)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("thin")
    out = folder / "run"
    words = ["train", "--model", small.base(), "--data", str(small.data(folder / "data")), *small.QUICK]
    posterior = "Temperature(Ensemble(SWAG(rank=4, snapshots=6), members=2))"
    assert cli.run([*words, "--out", str(out), "--posterior", posterior, "--samples", "6"]) == 0
    return out


def made(run: Path) -> int:
    return sum((run / f"{part}.safetensors").stat().st_size for part in ("adapter_model", "posterior"))


@pytest.mark.parametrize(
    ("share", "how", "expected"),
    [(0.8, "auto", "rank=2"), (0.8, "samples", "members="), (0.25, "auto", "Point(")],
)
def test_a_smaller_run_is_a_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], share: float, how: str, expected: str
) -> None:
    budget, out, data = int(share * made(run)), tmp_path / "smaller", run.parent / "data"
    capsys.readouterr()
    words = ["thin", str(run), "--bytes", str(budget), "--out", str(out), "--how", how, "--json"]
    assert cli.run(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] == made(out) <= budget < told["bytes_before"] == made(run)
    card = store.read_card(out)
    assert expected in card.posterior
    assert json.loads((out / "cost.json").read_text())["stored_bytes"] == made(out)
    assert cli.run(["evaluate", str(out), "--data", str(data), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == made(out)
    assert cli.run(["predict", str(out), "--input", str(data / "test.jsonl")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 30
    if how == "samples":  # as good as what it was made from, with as many draws
        temperature = load_file(out / "posterior.safetensors")["temperature"]
        assert len(temperature) == int(found["samples"])
        assert len(temperature.unique()) == 1


def test_what_thin_refuses(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["thin", str(run), "--out", str(tmp_path / "o"), "--bytes"]
    assert cli.run([*words, "100"]) == 2
    error = capsys.readouterr().err
    assert "do not hold one member" in error
    least = error.split("--bytes ")[1].split()[0]
    assert not (tmp_path / "o" / "posterior.json").exists()
    assert cli.run([*words, least]) == 0  # what it says to type works
    assert made(tmp_path / "o") <= int(least)
    assert cli.run([*words, least]) == 2
    assert "holds a run already" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "o")
    assert cli.run([*words, "much"]) == 2
    assert cli.run([*words, "1MB", "--how", "halves"]) == 2
    assert cli.run(["thin", str(tmp_path), "--out", str(tmp_path / "p"), "--bytes", "1MB"]) == 2
