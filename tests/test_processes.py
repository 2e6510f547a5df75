"""Two processes on the CPU against one."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kilobayes import tree

PROGRAM = Path(__file__).parent / "programs" / "processes.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("processes")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(PROGRAM), str(place)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return place


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "process-0.safetensors")


def test_all_processes_hold_the_same(folder: Path, found: dict[str, Tensor]) -> None:
    assert int(found["processes"]) == 2
    assert not tree.first_difference(found, load_file(folder / "process-1.safetensors"))


def test_the_first_alone_writes_checkpoints(folder: Path) -> None:
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-0"]


def test_equal_one_process(found: dict[str, Tensor]) -> None:
    names = runpy.run_path(str(PROGRAM))
    alone = names["run"](names["prior"]())
    torch.testing.assert_close(found["losses"], alone.losses, rtol=1e-5, atol=1e-6)
    masked = names["run"](names["masked"]())
    for part, state in (("done", alone.state), ("masked", masked.state)):
        for key, value in tree.flatten_state(state).items():
            error = float((found[f"{part}|{key}"] - value).abs().max())
            assert error <= 1e-5 * max(1.0, float(value.abs().max())), key


def test_a_stop_in_one_stops_all_at_the_same_step(found: dict[str, Tensor]) -> None:
    assert found["late-losses"].shape == (3, 2)
    assert found["late|count"].tolist() == [2.0, 2.0]  # the tail starts after the first of three steps
