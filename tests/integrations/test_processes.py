"""Two processes train together; the posterior is of what both hold, and one of them writes it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
PROGRAM = str(ROOT / "tests" / "programs" / "trainer.py")
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def test_two_processes_collect_one_posterior(tmp_path: Path) -> None:
    """12 steps of 8 rows, 4 in each process; the tail is the last six steps."""
    done = subprocess.run(
        [sys.executable, *LAUNCH, PROGRAM, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (load_file(tmp_path / f"process-{index}.safetensors") for index in (0, 1))
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert first["rates"].tolist()[6:] == pytest.approx([0.002] * 6)
    held = load_file(tmp_path / "run" / "posterior.safetensors")
    averages = {k.removeprefix("average|"): v for k, v in held.items() if k.startswith("average|")}
    assert len(averages) == len(first) // 12
    for key, value in averages.items():
        expected = torch.stack([first[f"{step}|{key}"].double() for step in range(7, 13)]).mean(dim=0)
        torch.testing.assert_close(value[0].double(), expected, rtol=1e-5, atol=1e-8)
