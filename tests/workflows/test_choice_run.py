"""Runs of decoders that choose: learned, saved, loaded, predicted, evaluated, compared and calibrated."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kilobayes as kb
from kilobayes import cli, store
from kilobayes.run_yaml import read_yaml
from kilobayes.tasks.questions import load_questions
from tests.small import read, write
from tests.small_choice import QUICK, base, labelled, questions


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of multiple choice, with its data beside it."""
    folder = tmp_path_factory.mktemp("choice")
    write(folder / "data" / "train.jsonl", questions(160, 1))
    write(folder / "data" / "test.jsonl", questions(40, 2))
    words = ["train", "--model", base(), "--task", "choice", "--data", str(folder / "data"), *QUICK]
    assert cli.run([*words, "--out", str(folder / "run")]) == 0
    return folder / "run"


def data(run: Path) -> str:
    return str(run.parent / "data")


def test_a_rule_is_learned(run: Path) -> None:
    losses = [np.mean(line["loss"]) for line in read(run / "log.jsonl")]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    found = json.loads((run / "metrics.json").read_text())["runs"][0]
    assert found["metrics"]["accuracy"]["value"] > 0.8


def test_the_card_says_how_rows_are_put(run: Path) -> None:
    card = store.read_card(run)
    assert (card.task, card.classes, card.scoring) == ("choice", [*"ABCD"], "")
    assert card.template == "Question: {question}\n{choices}\nAnswer:"
    assert "'question': '...', 'choices': ['...', '...']" in (run / "README.md").read_text()
    assert read_yaml(run / "run.yaml")["task"] == "choice"
    report = (run / "report.html").read_text()
    assert "A. w" in report
    rows = read(run / "predictions.jsonl")
    tested = load_questions(data(run), "test")
    for row, options, label in zip(rows, tested.options, tested.labels, strict=True):
        assert row["expected"] == "ABCD"[label]
        assert row["answer"] == options["ABCD".index(row["label"])]
        assert {row["probs"][letter] for letter in "ABCD"[len(options) :]} <= {0.0}


def test_a_loaded_run_predicts_the_same(run: Path, tmp_path: Path) -> None:
    rows = read(run.parent / "data" / "test.jsonl")
    loaded = kb.load(run)
    found = loaded.predict_proba(rows)
    stored = [list(row["probs"].values()) for row in read(run / "predictions.jsonl")]
    np.testing.assert_allclose(found, stored, atol=2e-6)
    loaded.save(tmp_path / "copy")
    np.testing.assert_array_equal(kb.load(tmp_path / "copy").predict_proba(rows), found)
    assert loaded.predict(rows[:3]).tolist() == [row["label"] for row in read(run / "predictions.jsonl")[:3]]
    assert read_yaml(tmp_path / "copy" / "run.yaml")["template"] == loaded.fitted_.card.template


def test_commands_on_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blind = [{k: v for k, v in row.items() if k != "answer"} for row in questions(6, 2)]
    source, out = write(tmp_path / "blind.jsonl", blind), tmp_path / "out.jsonl"
    assert cli.run(["predict", str(run), "--input", str(source), "--output", str(out)]) == 0
    assert [row["probs"] for row in read(out)] == [r["probs"] for r in read(run / "predictions.jsonl")[:6]]
    assert cli.run(["evaluate", str(run), "--data", data(run), "--ood", str(source), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] > 0.8
    words = ["calibrate", str(run), "--data", data(run), "--split", "train", "--limit", "30"]
    words += ["--posterior", "Temperature(Laplace())", "--test", "test", "--out", str(tmp_path / "laplace")]
    assert cli.run([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["after"]["accuracy"] > 0.8
    runs = [str(run), str(tmp_path / "laplace")]
    assert cli.run(["compare", *runs, "--data", data(run), "--out", str(tmp_path / "both"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 2
    assert cli.run(["predict", str(run), "--input", str(write(tmp_path / "t.jsonl", [{"text": "red"}]))]) == 2
    assert "have no options" in capsys.readouterr().err


def test_options_by_their_likelihood(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The right option is the question's own colour."""
    rows: list[dict[str, Any]] = []
    for row in questions(80, 5):
        colour = next(word for word in row["question"].split() if word in ("red", "blue", "green", "gold"))
        rows.append(
            row | {"choices": [colour if i == row["answer"] else o for i, o in enumerate(row["choices"])]}
        )
    write(tmp_path / "data" / "train.jsonl", rows)
    write(tmp_path / "data" / "test.jsonl", rows[:20])
    words = ["train", "--model", base(), "--task", "choice", "--answers", "text/token", *QUICK, "--json"]
    words += ["--data", str(tmp_path / "data"), "--posterior", "SWAG()", "--out", str(tmp_path / "run")]
    assert cli.run(words) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] > 0.8
    card = store.read_card(tmp_path / "run")
    assert (card.scoring, card.template) == ("token", "Question: {question}\nAnswer:")
    found = kb.load(tmp_path / "run").predict_proba(rows[:20])
    stored = [list(row["probs"].values()) for row in read(tmp_path / "run" / "predictions.jsonl")]
    np.testing.assert_allclose(found, stored, atol=2e-6)


def test_labels_that_are_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "data" / "train.jsonl", labelled(100, 1))
    write(tmp_path / "data" / "test.jsonl", labelled(40, 2))
    words = ["train", "--model", base(), "--task", "choice", "--answers", "no,yes", *QUICK, "--json"]
    words += [
        "--data",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path / "run"),
        "--target-modules",
        "q_proj,v_proj",
    ]
    assert cli.run(words) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] > 0.8
    loaded = kb.load(tmp_path / "run")
    assert loaded.classes_.tolist() == ["0", "1"]
    assert loaded.predict(["w1 red", "blue w2"]).tolist() == ["1", "0"]
    again = [
        *words[: words.index("--answers")],
        "--answers",
        "no,no",
        "--data",
        str(tmp_path / "data"),
        "--json",
    ]
    assert cli.run([*again, "--out", str(tmp_path / "other")]) == 2
    assert "begin with the same token" in capsys.readouterr().out


def test_a_real_decoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Path(os.environ.get("KILOBAYES_MODELS", "")) / "stories260K"
    sst2 = Path(os.environ.get("KILOBAYES_DATA", "")) / "sst2"
    if not os.environ.get("KILOBAYES_MODELS") or not os.environ.get("KILOBAYES_DATA"):
        pytest.skip("KILOBAYES_MODELS and KILOBAYES_DATA hold the model and its data")
    words = ["train", "--model", str(model), "--data", str(sst2), "--task", "choice", "--answers", "bad,good"]
    words += ["--template", "{sentence}\\nIt was", "--limit-train", "48", "--limit", "24", "--epochs", "2"]
    words += ["--max-length", "64", "--batch-size", "8", "--json", "--out", str(tmp_path / "run")]
    assert cli.run(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n"] == 24
    assert found["nll"] < 1.0  # ln 2 is 0.69
    assert store.read_card(tmp_path / "run").template == "{sentence}\nIt was"
