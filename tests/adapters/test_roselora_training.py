"""RoseLoRA in the training loop: sparse at the end, resumed to the same, posteriors on the support."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kilobayes import host, spec, train, tree
from kilobayes.adapters import RoseLoRA
from kilobayes.checkpoint import Checkpoint
from kilobayes.energy import ModelEnergy
from kilobayes.host import compact
from kilobayes.posteriors import Point, ask
from kilobayes.random import generator
from kilobayes.testing.tiny import TinyRows, TinyTask, nll, tiny_base, tiny_model, tiny_start
from kilobayes.types import Params

METHOD = RoseLoRA(r=3, alpha=6.0, keep=0.15, start=0.1, end=0.5)


def settings(**changes: Any) -> train.Settings:
    return train.Settings(**{"lr": 2e-2, "epochs": 4, "batch_size": 16, "seeds": (3,), **changes})


def nonzero(theta: Params) -> dict[str, torch.Tensor]:
    """How many numbers of each row of A and column of B are not zero ``(S, r)``."""
    found = {k: v.mT if k.endswith("/B") else v for k, v in theta.items() if k.endswith(("/A", "/B"))}
    return {k: (v != 0).sum(-1) for k, v in found.items()}


def widths(model: Any) -> dict[str, int]:
    return {f"{s.name}/{leaf}": d for s in host.sites(model) for leaf, d in (("A", s.d_in), ("B", s.d_out))}


def wanted(model: Any) -> dict[str, int]:
    """15% of 32 and of 64, rounded up."""
    return {key: {32: 5, 64: 10}[width] for key, width in widths(model).items()}


def test_training_ends_sparse_and_learns() -> None:
    model, rows, seen = tiny_model(METHOD), TinyRows.make(), []

    class Watch(Point):
        def observe(self, state: Any, theta: Params, progress: Any) -> Any:
            counts = nonzero(theta)
            seen.append(sum(int(v.sum()) for v in counts.values()))
            return super().observe(state, theta, progress)

    done = train.fit(model, rows, nll, Watch(), tiny_start(model, [3, 4]), settings(seeds=(3, 4)))
    counts = nonzero(done.state.theta)
    assert {k: v.unique().tolist() for k, v in counts.items()} == {k: [v] for k, v in wanted(model).items()}
    assert seen[1:] == sorted(seen[1:], reverse=True)
    assert seen[0] > 5 * seen[-1]
    assert (done.losses[-3:].mean(0) < 0.9 * done.losses[:3].mean(0)).all()


def test_from_the_end_of_the_schedule_the_support_is_frozen() -> None:
    model, supports = tiny_model(METHOD), []

    class Watch(Point):
        def observe(self, state: Any, theta: Params, progress: Any) -> Any:
            supports.append({k: v != 0 for k, v in tree.clone(theta).items() if k.endswith(("/A", "/B"))})
            return super().observe(state, theta, progress)

    train.fit(model, TinyRows.make(), nll, Watch(), tiny_start(model, [3]), settings())
    half = len(supports) // 2
    assert all(not tree.first_difference(s, supports[-1]) for s in supports[half - 1 :])
    assert tree.first_difference(supports[half - 2], supports[-1])


@pytest.mark.parametrize("after", [3, 7])
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path: Path, after: int) -> None:
    """Killed while the share falls, and after the support was frozen."""
    model, rows = tiny_model(METHOD), TinyRows.make()
    start = tiny_start(model, [3, 4])

    def run(save: Checkpoint | None, stop: int = 0) -> Any:
        def watch(progress: Any, losses: torch.Tensor) -> None:
            if progress.step == stop:
                raise InterruptedError

        both = settings(seeds=(3, 4))
        return train.fit(model, rows, nll, Point(), start, both, save=save, watch=watch)

    whole = run(None)
    with pytest.raises(InterruptedError):
        run(Checkpoint(tmp_path / "latest.safetensors", {}, seconds=-1.0), after + 1)
    resumed = run(Checkpoint(tmp_path / "latest.safetensors", {}, resume=True))
    assert not tree.first_difference(resumed.state.theta, whole.state.theta)


def test_a_diverged_member_changes_no_other() -> None:
    model, rows = tiny_model(METHOD), TinyRows.make()
    start = tiny_start(model, [3, 4])
    both = train.fit(model, rows, nll, Point(), start, settings(seeds=(3, 4), lr=(2e-2, 1e9)))
    assert both.diverged == [1]
    alone = train.fit(model, rows, nll, Point(), tree.member(start, 0), settings())
    for key, value in alone.state.theta.items():
        assert torch.allclose(both.state.theta[key][:1], value, atol=1e-4), key
    counts = {k: v.unique().tolist() for k, v in nonzero(both.state.theta).items()}
    assert counts == {k: [v] for k, v in wanted(model).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_leaves_the_rest_of_the_base_as_it_is(dtype: torch.dtype) -> None:
    base = tiny_base().to(dtype)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    model = tiny_model(METHOD, base=base)
    noise = {k: torch.randn(v.shape, generator=generator(1)) for k, v in tree.clone(host.read(model)).items()}
    host.write(model, METHOD.restrict(noise, noise, None))
    sites = host.sites(model)
    model.merge_adapter()
    after = dict(host.without_adapter(model))
    for site in sites:
        old, new = before[f"{site.name}.weight"], after[f"{site.name}.weight"]
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        changed = float((old.view(bits) != new.view(bits)).double().mean())
        assert 0.5 * METHOD.density(site) < changed <= METHOD.density(site)


def test_the_compact_file(tmp_path: Path) -> None:
    model = tiny_model(METHOD)
    noise = {k: torch.randn(v.shape, generator=generator(1)) for k, v in tree.clone(host.read(model)).items()}
    theta = METHOD.restrict(noise, noise, None)
    host.write(model, theta)
    found = compact.export_compact(model, tmp_path)
    assert found["adapter"] == METHOD.stored(host.sites(model)) == 6 * 3 * 2 * (3 * (5 + 5) + 2 * (5 + 10))
    assert found["error"] == 0.0
    assert not tree.first_difference(
        tree.clone(host.read(compact.load_compact(tiny_base(), tmp_path))), theta
    )
    dense = (tmp_path / "dense").as_posix()
    host.write(model, noise)
    assert compact.export_compact(model, dense)["adapter"] > 4 * METHOD.count(host.sites(model))
    assert not tree.first_difference(tree.clone(host.read(compact.load_compact(tiny_base(), dense))), noise)


POSTERIORS = [
    "SWAG(rank=3)",
    "SWA(start=0.6)",
    "BLoB()",
    "MCDropout(p=0.3)",
    "Laplace(linearised=False, rank=2, prior=1.0)",
    "IVON()",
    "Ensemble(TFB(samples=2, bisections=1), members=2)",
]


@pytest.mark.parametrize("text", POSTERIORS)
def test_draws_of_a_posterior_live_on_the_support(text: str) -> None:
    posterior = spec.posterior(text)
    model, rows = tiny_model(METHOD), TinyRows.make()
    seeds, held = tuple(range(3, 3 + ask.members(posterior))), TinyRows.make(12, seed=1)
    energy: Any = ModelEnergy(model, TinyTask(), held, trained=rows)  # type: ignore[arg-type]
    start = tiny_start(model, list(seeds))
    done = train.fit(model, rows, nll, posterior, start, settings(seeds=seeds), energy=energy)
    assert not done.diverged
    with torch.no_grad():
        state = ask.fit(posterior, done.state, energy, generator(2))
        drawn = ask.draws(posterior, state, energy, 4, generator(3))
    most = {key: int(count.max()) for key, count in nonzero(drawn).items()}
    assert {k: v for k, v in most.items() if v > wanted(model)[k]} == {}
    # masks of dropout may have met each row of A
    assert all(v == wanted(model)[k] for k, v in most.items() if k.endswith("/B") or "Dropout" not in text)
    if posterior.support(state) is None:
        assert any(bool((drawn[key][0] != drawn[key][1]).any()) for key in most)


def test_a_run_stopped_by_the_clock_is_sparse() -> None:
    """What is left of the schedule is made up for at once."""
    model, rows = tiny_model(METHOD), TinyRows.make()
    short = settings(epochs=50, max_seconds=1e-9)
    done = train.fit(model, rows, nll, spec.posterior("Point()"), tiny_start(model, [3]), short)
    assert done.stopped == "time"
    assert len(done.losses) == 1
    for key, count in nonzero(done.state.theta).items():
        assert int(count.max()) <= wanted(model)[key]
