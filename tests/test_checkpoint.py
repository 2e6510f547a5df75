from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kilobayes import optim, tree
from kilobayes.checkpoint import Checkpoint, read_tensors, write_atomically
from kilobayes.errors import KilobayesError
from kilobayes.posteriors import SWAG, Ensemble, Point, Temperature
from kilobayes.random import Streams, generator
from kilobayes.testing.posteriors import observed, walk
from kilobayes.types import Params, Posterior, Progress

POSTERIOR = Ensemble(Temperature(SWAG(rank=3, start=0.2, snapshots=6)), members=2)
IDENTITY = {"lr": 0.1, "seeds": (1, 2), "posterior": "SWAG()"}


def parts(seed: int) -> tuple[Params, optim.AdamWState, Streams]:
    theta = walk([seed, seed + 1], 3)[-1]
    moments = optim.init(theta)
    optim.step(optim.AdamW(), moments, theta, walk([seed], 2)[-1], torch.tensor([0.1, 0.2]), 1, {})
    streams = Streams([generator(seed), generator(seed + 1)])
    streams.normal(torch.empty(2, seed))
    return theta, moments, streams


def write(path: Path, posterior: Posterior = POSTERIOR) -> object:
    state = observed(posterior, walk([1, 2]))
    theta, moments, streams = parts(3)
    losses, alive = torch.rand(9, 2, generator=generator(1)), torch.tensor([True, False])
    Checkpoint(path, dict(IDENTITY)).write(
        7, state, theta, moments, streams, losses, alive, {"s/memory": torch.ones(2, 3)}
    )
    return state


def test_everything_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "made" / "latest.safetensors"
    state = write(path)
    theta, moments, streams = parts(8)
    found = Checkpoint(path, dict(IDENTITY), resume=True).load(POSTERIOR, None, theta, moments, streams)
    assert found is not None
    assert found.step == 7
    assert found.alive.tolist() == [True, False]
    assert found.memo["s/memory"].tolist() == torch.ones(2, 3).tolist()
    assert torch.equal(found.losses, torch.rand(9, 2, generator=generator(1)))
    assert not tree.first_difference(tree.flatten_state(found.state), tree.flatten_state(state))
    expected, expected_moments, expected_streams = parts(3)
    assert not tree.first_difference(theta, expected)
    assert not tree.first_difference(moments.first, expected_moments.first)
    assert not tree.first_difference(moments.second, expected_moments.second)
    like = torch.empty(2, 5)
    assert torch.equal(streams.normal(like), expected_streams.normal(like))


def test_nothing_is_loaded_unasked(tmp_path: Path) -> None:
    write(tmp_path / "c")
    theta, moments, streams = parts(8)
    assert Checkpoint(tmp_path / "c", dict(IDENTITY)).load(POSTERIOR, None, theta, moments, streams) is None
    assert Checkpoint(tmp_path / "d", {}, resume=True).load(POSTERIOR, None, theta, moments, streams) is None
    assert not tree.first_difference(theta, parts(8)[0])


def load(
    path: Path, identity: dict | None = None, members: int = 2, posterior: Posterior = POSTERIOR
) -> None:
    theta, moments, streams = parts(8)
    if members != 2:
        theta, moments = walk([1] * members)[0], optim.init(walk([1] * members)[0])
    Checkpoint(path, dict(identity or IDENTITY), resume=True).load(posterior, None, theta, moments, streams)


def test_another_run_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    write(tmp_path / "c")
    with pytest.raises(KilobayesError) as caught:
        load(tmp_path / "c", IDENTITY | {"lr": 0.2, "extra": None, "batch": 8})
    assert "belongs to another run" in caught.value.wrong
    assert "lr: 0.1 there, 0.2 here" in caught.value.found
    assert "batch: None there, 8 here" in caught.value.found
    assert caught.value.remedy


@pytest.mark.parametrize("members", [1, 3])
def test_other_weights_are_refused(tmp_path: Path, members: int) -> None:
    write(tmp_path / "c")
    with pytest.raises(KilobayesError, match="does not fit"):
        load(tmp_path / "c", members=members)


def test_another_posterior_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "c", Point())
    with pytest.raises(KilobayesError, match="does not fit"):
        load(tmp_path / "c")


@pytest.mark.parametrize("left", [0, 5, 200, 3000, -1])
def test_a_truncated_file_gives_an_error_in_three_parts(tmp_path: Path, left: int) -> None:
    path = tmp_path / "c"
    write(path)
    os.truncate(path, left if left >= 0 else path.stat().st_size - 1)
    with pytest.raises(KilobayesError) as caught:
        load(path)
    assert str(path) in caught.value.wrong
    assert caught.value.found
    assert caught.value.remedy


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello " * 99)
    (tmp_path / "folder").mkdir()
    write_atomically(tmp_path / "other", {"x": torch.zeros(3)}, {"identity": json.dumps(IDENTITY)})
    for name in ("text", "folder", "other"):
        with pytest.raises(KilobayesError):
            load(tmp_path / name)
    with pytest.raises(KilobayesError, match="is missing"):
        read_tensors(tmp_path / "nothing")


def test_tensors_of_every_kind_come_back(tmp_path: Path) -> None:
    whole = {
        "view": torch.arange(12.0).reshape(3, 4).T,
        "same": (shared := torch.arange(4.0)),
        "again": shared,
        "none": torch.empty(2, 0, 3),
        "double": torch.tensor([1e-300], dtype=torch.float64),
        "half": torch.tensor([1.5], dtype=torch.bfloat16, requires_grad=True),
        "flag": torch.tensor([True]),
        "number": torch.tensor(3),
    }
    write_atomically(tmp_path / "t", whole, {"a": "b"})
    found, metadata = read_tensors(tmp_path / "t")
    assert metadata == {"a": "b"}
    assert not tree.first_difference(found, whole)
    assert all(found[k].dtype == v.dtype for k, v in whole.items())


def test_when_it_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("kilobayes.checkpoint.time.monotonic", lambda: now[0])
    save = Checkpoint(Path("c"), {}, seconds=20.0, last=100.0)
    assert not save.due(Progress(3, 9, 3, 1))
    assert save.due(Progress(9, 9, 3, 1))
    now[0] = 120.5
    assert save.due(Progress(3, 9, 3, 1))


def test_killed_at_any_moment_and_resumed_to_the_same_bits(tmp_path: Path) -> None:
    program = Path(__file__).parent / "programs" / "crash.py"
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(found) == 21
    assert {k: v for k, v in found.items() if v} == {}
