"""Runs that are killed or interrupted go on to the same result, bit for bit; in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kilobayes import cli

from .. import small

PROGRAM = Path(__file__).parents[1] / "programs" / "train.py"
POSTERIOR = "Temperature(Ensemble(SWAG(rank=2, start=0.3), members=2))"
SAME = [
    "posterior.safetensors",
    "adapter_model.safetensors",
    "log.jsonl",
    "predictions.jsonl",
    "posterior.json",
]


def words(data: Path, run: Path) -> list[str]:
    flags = ["train", "--model", small.base(), "--data", str(data), "--out", str(run), "--seed", "5"]
    return [*flags, *small.QUICK, "--posterior", POSTERIOR]


def start(moment: str, sent: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM), moment, sent, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(data, run): a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    data, run = small.data(folder / "data"), folder / "run"
    assert cli.run(words(data, run)) == 0
    return data, run


# 12 steps, a checkpoint at 3, 6, 9 and 12. Files are renamed in this order: run.yaml, env.json, the
# checkpoints, log.jsonl, the adapter's two, posterior's two, cost.json and the report's; README.md last.
@pytest.mark.parametrize("moment", ["step:1", "step:8", "replace:5", "replace:9", "renamed:13"])
def test_a_killed_run_goes_on_to_the_same_result(
    whole: tuple[Path, Path], tmp_path: Path, moment: str
) -> None:
    data, reference = whole
    run = tmp_path / "run"
    done = start(moment, "SIGKILL", words(data, run))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (run / "README.md").exists()
    assert cli.run(["train", "--resume", "--out", str(run)]) == 0
    assert [name for name in SAME if not small.same_files(run, reference, name)] == []
    assert sorted(p.name for p in run.iterdir()) == sorted(p.name for p in reference.iterdir())


def test_ctrl_c_keeps_a_checkpoint_and_says_how_to_go_on(whole: tuple[Path, Path], tmp_path: Path) -> None:
    data, reference = whole
    run = tmp_path / "a run"
    done = start("step:4", "SIGINT", [*words(data, run), "--json"])
    assert done.returncode == 130, done.stderr
    assert done.stdout == ""
    assert "stopped after step 4 of 12, with a checkpoint" in done.stderr
    (typed,) = [line.strip() for line in done.stderr.splitlines() if "--resume" in line]
    assert typed == f"kilobayes train --resume --out '{run}'"
    assert cli.run(["train", "--resume", "--out", str(run)]) == 0
    assert [name for name in SAME if not small.same_files(run, reference, name)] == []


def test_ctrl_c_before_anything_is_kept(whole: tuple[Path, Path], tmp_path: Path) -> None:
    done = start("replace:1", "SIGINT", words(whole[0], tmp_path / "run"))
    assert done.returncode == 130
    assert "nothing is kept" in done.stderr
    assert cli.run(words(whole[0], tmp_path / "run")) == 0  # the folder may be used again


def test_a_checkpoint_of_other_rows_is_refused(
    whole: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = small.data(tmp_path / "data")
    run = tmp_path / "run"
    assert start("step:7", "SIGKILL", words(data, run)).returncode == -signal.SIGKILL
    small.write(data / "train.jsonl", small.rows(60, 9))
    assert cli.run(["train", "--resume", "--out", str(run)]) == 2
    assert "belongs to another run" in capsys.readouterr().err


def test_a_run_stopped_by_time_can_go_on(whole: tuple[Path, Path], tmp_path: Path) -> None:
    data, reference = whole
    run = tmp_path / "run"
    assert cli.run([*words(data, run), "--max-minutes", "0.0000001"]) == 0
    assert 1 <= len(small.read(run / "log.jsonl")) < 12
    meta = json.loads((run / "metrics.json").read_text())["meta"]
    assert any("--max-minutes" in note for note in meta["notes"])
    assert cli.run(["train", "--resume", "--out", str(run), "--max-minutes", "0"]) == 0
    assert small.same_files(run, reference)
