"""How training ends early: a time limit, Ctrl-C, and going on from there to the same bits."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kilobayes import train, tree
from kilobayes.adapters import LoRA
from kilobayes.checkpoint import Checkpoint
from kilobayes.posteriors import SWA, SWAG, Ensemble, Point
from kilobayes.testing.tiny import TinyRows, nll, tiny_model, tiny_start
from kilobayes.types import Params, Posterior, Progress

ROWS = TinyRows.make(27, seed=4)  # in batches of 8: four steps an epoch
METHOD = LoRA(r=2, dropout=0.25)


def settings(**changes: Any) -> train.Settings:
    plain: dict[str, Any] = {"lr": 0.01, "epochs": 2, "batch_size": 8, "seeds": (5,)}
    return train.Settings(**plain | changes)


def run(posterior: Posterior, **changes: Any) -> train.Trained:
    keywords = {k: changes.pop(k) for k in ("save", "watch") if k in changes}
    chosen, model = settings(**changes), tiny_model(METHOD)
    return train.fit(model, ROWS, nll, posterior, tiny_start(model, list(chosen.seeds)), chosen, **keywords)


def stop_after(count: int) -> Callable[[Progress, Tensor], None]:
    def watch(progress: Progress, loss: Tensor) -> None:
        if progress.step == count:
            os.kill(os.getpid(), signal.SIGINT)

    return watch


class Clock:
    """A clock that a watch moves on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
        self.now, self.stop = 0.0, stop
        monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: self.now))

    def watch(self, progress: Progress, loss: Tensor) -> None:
        self.now = 100.0 if progress.step >= self.stop else 1.0


@pytest.mark.parametrize("stop", [1, 3, 6])
@pytest.mark.parametrize("posterior", [SWAG(rank=2, start=0.5, snapshots=2), SWA(by_epoch=True), Point()])
@pytest.mark.filterwarnings("ignore:SWAG saw fewer")
def test_stops_in_time_with_a_usable_posterior(
    monkeypatch: pytest.MonkeyPatch, posterior: Any, stop: int
) -> None:
    seen: list[Params] = []

    class Spy(type(posterior)):  # type: ignore[misc]
        def observe(self, state: Any, theta: Params, progress: Progress) -> Any:
            if progress.step == len(seen) + 1:
                seen.append(tree.clone(theta))
            return super().observe(state, theta, progress)

    spy = Spy(**vars(posterior))
    clock = Clock(monkeypatch, stop)
    trained = run(spy, epochs=4, max_seconds=10.0, watch=clock.watch)
    assert trained.stopped == "time"
    assert trained.losses.shape == (stop, 1)
    mean = tree.flat(posterior.mean(trained.state))
    assert torch.isfinite(tree.flat(posterior.sample(trained.state, 3, torch.Generator()))).all()
    if isinstance(posterior, Point):
        assert torch.equal(mean, tree.flat(seen[-1]))
        return
    # the plan was 16 steps with the tail from step 9, or 10 for the epochs; no snapshot was due: the last
    # weights are it
    assert trained.state.count.tolist() == [1.0]
    torch.testing.assert_close(mean, tree.flat(seen[-1]), rtol=0, atol=0)


def test_the_last_weights_are_collected_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop at a step where a snapshot is due anyway must not count it twice."""
    clock = Clock(monkeypatch, 12)
    posterior = SWA(start=0.5, snapshots=4)  # of 16 steps: after 10, 12, 14 and 16
    trained = run(posterior, epochs=4, max_seconds=10.0, watch=clock.watch)
    assert trained.state.count.tolist() == [2.0]


def test_interrupts_write_a_checkpoint_and_resuming_is_bit_identical(tmp_path: Path) -> None:
    posterior = Ensemble(SWAG(rank=2, start=0.25, snapshots=4), members=2)
    whole = run(posterior, seeds=(5, 6))
    path = tmp_path / "checkpoints" / "latest.safetensors"
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(posterior, seeds=(5, 6), save=Checkpoint(path, {"a": 1}), watch=stop_after(5))
    assert signal.getsignal(signal.SIGINT) is handler
    assert [p.name for p in path.parent.iterdir()] == ["latest.safetensors"]
    steps: list[int] = []
    resumed = run(
        posterior,
        seeds=(5, 6),
        save=Checkpoint(path, {"a": 1}, resume=True),
        watch=lambda progress, loss: steps.append(progress.step),
    )
    assert steps == [6, 7, 8]
    assert not tree.first_difference(tree.flatten_state(resumed.state), tree.flatten_state(whole.state))
    assert torch.equal(resumed.losses, whole.losses)
    again = run(posterior, seeds=(5, 6), save=Checkpoint(path, {"a": 1}, resume=True))
    assert not tree.first_difference(tree.flatten_state(again.state), tree.flatten_state(whole.state))


class Interrupting(TinyRows):
    """Ctrl-C while a batch is made, in the middle of a step."""

    calls = 0

    def batch(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        Interrupting.calls += 1
        if Interrupting.calls == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return super().batch(rows)


def test_an_interrupt_within_a_step_finishes_it_first(tmp_path: Path) -> None:
    model, rows, save = (
        tiny_model(METHOD),
        Interrupting(ROWS.ids, ROWS.labels),
        Checkpoint(tmp_path / "c", {}),
    )
    with pytest.raises(KeyboardInterrupt):
        train.fit(model, rows, nll, Point(), tiny_start(model, [5]), settings(accumulate=2), save=save)
    resumed = run(Point(), accumulate=2, save=Checkpoint(tmp_path / "c", {}, resume=True))
    assert not tree.first_difference(resumed.state.theta, run(Point(), accumulate=2).state.theta)


def test_a_stop_in_time_can_be_resumed_as_if_it_had_not_been(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    posterior = SWAG(rank=2, start=0.25, snapshots=3)
    whole = run(posterior)
    clock = Clock(monkeypatch, 5)
    part = run(posterior, max_seconds=10.0, watch=clock.watch, save=Checkpoint(tmp_path / "c", {}))
    assert part.stopped == "time"
    resumed = run(posterior, save=Checkpoint(tmp_path / "c", {}, resume=True))
    assert not tree.first_difference(tree.flatten_state(resumed.state), tree.flatten_state(whole.state))
