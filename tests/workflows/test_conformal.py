"""Sets and accepted rows from the command line and from Python, on a tiny model."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import kilobayes as kb
from kilobayes import cli
from kilobayes.errors import KilobayesError
from kilobayes.metrics import conformal
from kilobayes.workflows.conformal import FILE
from kilobayes.workflows.finetune import load

from .. import small

pytest.importorskip("mapie")

Made = tuple[Path, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(folder, run): a run with 40 calibration rows, a file of texts, and one of 60 labelled rows."""
    folder = tmp_path_factory.mktemp("conformal")
    small.write(folder / "data" / "train.jsonl", small.rows(140, 1))
    small.write(folder / "data" / "test.jsonl", small.rows(80, 2))
    small.write(folder / "texts.jsonl", [{"text": r["text"]} for r in small.rows(30, 3)])
    small.write(folder / "held.jsonl", small.rows(60, 4))
    arguments = ["--model", small.base(), "--data", folder / "data", "--out", folder / "run", *small.QUICK]
    arguments += [
        "--posterior",
        "Temperature(SWAG(rank=2))",
        "--calibration",
        40,
        "--epochs",
        6,
        "--lr",
        0.03,
    ]
    arguments += ["--target-modules", "all-linear", "--samples", 4]
    assert cli.run(["train", *map(str, arguments)]) == 0
    return folder, folder / "run"


def run(*words: Any, code: int = 0) -> None:
    assert cli.run([str(w) for w in words]) == code


def test_the_run_keeps_what_it_saw_of_its_calibration_rows(made: Made) -> None:
    _, folder = made
    stored = load_file(folder / FILE)
    assert stored["probs"].shape == (40, 3)
    assert stored["probs"].dtype == torch.float32
    assert (folder / FILE).stat().st_size < 40 * (4 * 3 + 8) + 300
    again = load(folder).calibration
    assert again is not None
    assert np.array_equal(again.probs, stored["probs"].numpy())
    # labels are those of the rows: the model, which learned something, is right more often than by chance
    assert (again.probs.argmax(axis=1) == again.labels).mean() > 0.5


@pytest.mark.parametrize("coverage", [0.8, 0.9])
def test_predicts_sets(made: Made, coverage: float) -> None:
    folder, where = made
    out = folder / "sets.jsonl"
    run("predict", where, "--input", folder / "texts.jsonl", "--output", out, "--coverage", coverage)
    rows, stored = small.read(out), load_file(where / FILE)
    scores = 1.0 - stored["probs"].double().gather(1, stored["labels"][:, None])[:, 0]
    largest = float(scores.sort().values[int(np.ceil(41 * coverage)) - 1])
    clear = 0
    for row in rows:
        assert "accepted" not in row
        for name, p in row["probs"].items():  # probabilities are written with six digits
            if abs(1.0 - p - largest) > 1e-5:
                assert (name in row["set"]) == (1.0 - p <= largest)
                clear += 1
    assert clear > 60
    # Python says the same, and again after another load
    classifier = kb.load(where)
    texts = [row["text"] for row in rows]
    expected = [[name in row["set"] for name in row["probs"]] for row in rows]
    assert classifier.predict_sets(texts, coverage).tolist() == expected


def test_accepts_rows(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    folder, where = made
    out = folder / "accepted.csv"
    words = ["predict", where, "--input", folder / "texts.jsonl", "--output", out, "--coverage", 0.8]
    run(*words, "--max-error", 0.5, "--held-out", folder / "held.jsonl")
    rows = list(csv.DictReader(out.read_text(encoding="utf-8").splitlines()))
    fitted = load(where)
    held = kb.tasks.data.load_examples(str(folder / "held.jsonl"), classes=fitted.card.classes)
    least = conformal.threshold(fitted.calibrated(held).held(), 0.5)
    assert [row["accepted"] == "True" for row in rows] == [float(r["confidence"]) >= least for r in rows]
    assert f"of confidence {least:.2f} and above" in capsys.readouterr().err
    assert all(set(json.loads(row["set"])) <= set(fitted.card.classes) for row in rows)
    run("predict", where, "--input", folder / "texts.jsonl", "--max-error", 0.0001, code=2)
    assert "no threshold keeps errors below 0.0001" in capsys.readouterr().err


def test_evaluates_sets(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    folder, where = made
    run("evaluate", where, "--data", folder / "data", "--coverage", 0.8, "--sets", "aps", "--json")
    found = json.loads(capsys.readouterr().out)["sets"]
    fitted = load(where)
    test = kb.tasks.data.load_examples(str(folder / "data"), "test", classes=fitted.card.classes)
    probs = fitted.predict(test).probs.numpy()
    sets = conformal.sets(fitted.held(), probs, 0.8, "aps")
    assert found["set_size"] == pytest.approx(sets.sum() / 80)
    assert found["coverage"] == pytest.approx(sets[np.arange(80), test.labels].mean())
    # 80 rows and 40 calibration rows: deviations of 0.045 and 0.063
    assert found["coverage"] > 0.8 - 5 * np.hypot(0.045, 0.063)


def test_a_classifier_keeps_them_too(tmp_path: Path) -> None:
    rows = small.rows(80, 6)
    texts, labels = [r["text"] for r in rows], [r["label"] for r in rows]
    given = {"epochs": 4, "lr": 0.03, "batch_size": 8, "calibration": 0.4, "target_modules": "all-linear"}
    fitted = kb.Classifier(small.base(), "LoRA(r=2)", "Temperature()", **given).fit(texts, labels)
    sets = fitted.predict_sets(texts, 0.8)
    fitted.save(tmp_path / "a")
    again = kb.load(tmp_path / "a")
    assert np.array_equal(again.predict_sets(texts, 0.8), sets)
    assert again.threshold(0.6) == fitted.threshold(0.6)
    held = fitted.fitted_.held()
    assert len(held.labels) == 32
    # without rows held out there is nothing to go by, and a file of an earlier run does not stay
    plain = kb.Classifier(small.base(), "LoRA(r=2)", "Point()", **given | {"epochs": 1}).fit(texts, labels)
    with pytest.raises(KilobayesError, match="the run keeps none"):
        plain.predict_sets(texts)
    plain.save(tmp_path / "a")
    assert not (tmp_path / "a" / FILE).exists()


def test_refuses(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, where = made
    predict = ["predict", where, "--input", folder / "texts.jsonl"]

    def told(*words: Any, code: int = 2) -> str:
        run(*predict, *words, code=code)
        return capsys.readouterr().err

    assert "between 0 and 1" in told("--coverage", 1.5)
    assert "did you mean aps" in told("--coverage", 0.8, "--sets", "abs")
    assert "seen with 4 samples" in told("--coverage", 0.8, "--samples", 3)
    assert "at least 101 calibration rows" in told("--coverage", 0.99)
    assert "add --coverage" in told("--held-out", folder / "held.jsonl")
    bare = shutil.copytree(where, tmp_path / "bare")
    (bare / FILE).unlink()
    predict[1] = bare
    assert "the run keeps none" in told("--coverage", 0.8)
    run(*predict, "--coverage", 0.8, "--held-out", folder / "held.jsonl", "--samples", 3)
    for damage in (
        {"probs": torch.ones(3, 3)},
        {"probs": torch.full((3, 2), 0.5), "labels": torch.zeros(3).long()},
    ):
        save_file(damage, bare / FILE)
        assert f"{FILE} is damaged" in told("--coverage", 0.8)
    (bare / FILE).write_bytes(b"no tensors")
    assert "damaged" in told("--coverage", 0.8)
