"""Runs from Python: every kind of source, notes, folders; comparisons and exports of finished runs."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kilobayes import cli, tree
from kilobayes.errors import KilobayesError
from kilobayes.options import Options
from kilobayes.predict import logits
from kilobayes.run_yaml import write_yaml
from kilobayes.tasks.data import load_examples
from kilobayes.workflows import run as work
from kilobayes.workflows.data import load_splits
from kilobayes.workflows.finetune import load
from kilobayes.workflows.folder import default_folder, finished, place

from .. import small

ROWS = small.rows(48, 4)


def options(out: Path, **given: Any) -> Options:
    settings = {"epochs": 2, "lr": 0.01, "batch_size": 8, "adapter": "LoRA(r=2)", "posterior": "Point()"}
    return Options(model=small.base(), out=str(out), **(settings | given))


def sources(folder: Path) -> dict[str, Any]:
    pandas = pytest.importorskip("pandas")
    datasets = pytest.importorskip("datasets")
    frame = pandas.DataFrame(ROWS)
    frame.to_csv(folder / "a.csv", index=False)
    frame.to_parquet(folder / "a.parquet")
    with gzip.open(folder / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)
    return {
        "frame": frame,
        "list": ROWS,
        "columns": {k: [r[k] for r in ROWS] for k in ("text", "label")},
        "texts and labels": ([r["text"] for r in ROWS], [r["label"] for r in ROWS]),
        "dataset": datasets.Dataset.from_list(ROWS),
        "csv": folder / "a.csv",
        "parquet": str(folder / "a.parquet"),
        "jsonl.gz": str(folder / "a.jsonl.gz"),
    }


def test_every_kind_of_source_gives_the_same_run(tmp_path: Path) -> None:
    found = {}
    for name, source in sources(tmp_path).items():
        done = work.train(options(tmp_path / name), source=source)
        found[name] = (done.folder / "posterior.safetensors").read_bytes()
        assert finished(done.folder)
    assert len(found) == 8
    assert len(set(found.values())) == 1


def test_pairs_and_ood_rows(tmp_path: Path) -> None:
    data = small.data(tmp_path / "data", pairs=True)
    ood = small.write(tmp_path / "ood.jsonl", small.rows(9, 5, pairs=True))
    done = work.train(options(tmp_path / "r", data=str(data), ood=str(ood)))
    assert "ood_auroc" in done.summary
    assert done.fitted.card.paired
    assert "/" in done.evaluation.texts[0]
    single = small.write(tmp_path / "single.jsonl", small.rows(9, 5))
    with pytest.raises(KilobayesError, match="out-of-distribution rows are not of the kind"):
        load_splits(options(tmp_path / "s", data=str(data), ood=str(single)))


def test_notes_tell_what_a_reader_must_know(tmp_path: Path) -> None:
    told: list[str] = []
    long = [{"text": "red " * 99, "label": "warm"}, {"text": "blue " * 99, "label": "cold"}] * 12
    settings = options(
        tmp_path / "r", posterior="SWAG(rank=2, start=0.5)", epochs=1, batch_size=16, max_length=12
    )
    done = work.train(settings, source=long, say=told.append)
    notes = json.loads((done.folder / "metrics.json").read_text())["meta"]["notes"]
    text = " ".join(notes)
    assert "no test split" in text
    assert "SWAG saw fewer than two snapshots" in text
    assert "19 training rows (100%) were cut at 12 tokens" in text
    assert "evaluated rows (100%) were cut" in text
    assert [f"note: {n}" for n in notes] == [t for t in told if t.startswith("note: ")]
    assert "no test split" in (done.folder / "report.html").read_text(encoding="utf-8")


def test_rows_that_are_also_trained_on_are_counted(tmp_path: Path) -> None:
    data = small.data(tmp_path)
    train = small.read(data / "train.jsonl")
    small.write(data / "test.jsonl", [*train[:7], {"text": "green never seen before", "label": "fresh"}])
    splits = load_splits(options(tmp_path / "r", data=str(data), calibration="0"))
    assert splits.calibration is None
    assert splits.notes == ["7 of the 8 rows evaluated on are also among the training rows, word for word."]


def test_calibration_rows_of_their_own(tmp_path: Path) -> None:
    data = small.data(tmp_path / "data")
    small.write(data / "validation.jsonl", small.rows(11, 6))
    file = small.write(tmp_path / "c.jsonl", small.rows(7, 6))
    for calibration, count, trained in (
        ("validation", 11, 60),
        (str(file), 7, 60),
        ("5", 5, 55),
        ("0.5", 30, 30),
    ):
        splits = load_splits(options(tmp_path / "r", data=str(data), calibration=calibration))
        assert splits.calibration is not None
        assert (len(splits.calibration), len(splits.train), len(splits.test)) == (count, trained, 30)
    with pytest.raises(KilobayesError, match="no rows to evaluate on"):
        load_splits(options(tmp_path / "r", data=str(file), calibration="0"))


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_folder(Options(data="a/b.csv", posterior="SWAG(rank=2)", seed=3)) == Path(
        "runs/b-swag-rank-2-3"
    )
    assert place(Options(data="../x y.csv", posterior="Point()")).out == "runs/x-y-point-0"
    assert not (tmp_path / "runs").exists()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "notes.txt").write_text("mine")
    place(Options(data="d", out="old"))  # a folder without a run may be used
    write_yaml(tmp_path / "old" / "run.yaml", Options(data="other"))
    with pytest.raises(KilobayesError, match="data: other there, d here"):
        place(Options(data="d", out="old", resume=True))


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs a0 and a1, of one arm and two seeds; b of another arm; c as a0 at another rate."""
    folder = tmp_path_factory.mktemp("arms")
    data = str(small.data(folder / "data"))
    for name, given in {
        "a0": {"seed": 0},
        "a1": {"seed": 1},
        "b": {"posterior": "Ensemble(Point(), members=2)"},
        "c": {"lr": 0.001},
    }.items():
        work.train(options(folder / name, data=data, **given))
    return folder


def test_compare_pools_seeds_of_one_arm(
    arms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "compare",
        *(str(arms / n) for n in ("a0", "a1", "b", "c")),
        "--data",
        str(arms / "data"),
        "--json",
    ]
    assert cli.run([*words, "--out", str(tmp_path / "o")]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert [r["name"].split(":")[0] for r in found["runs"]] == ["a0", "a1", "b", "c"]
    assert list(found["over_seeds"]) == ["a0, a1"]  # c differs in its rate
    spread, values = found["over_seeds"]["a0, a1"]["nll"], [r["nll"] for r in found["runs"][:2]]
    assert spread["mean"] == pytest.approx(sum(values) / 2, abs=1e-5)
    assert spread["n"] == 2
    assert "over 2 seeds" in printed.err
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["metrics.json", "report.html"]
    own = json.loads((arms / "b" / "metrics.json").read_text())["runs"][0]["metrics"]["nll"]["value"]
    assert found["runs"][2]["nll"] == pytest.approx(own, abs=1e-6)


def test_compare_refuses_other_classes(
    arms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": r["text"], "label": r["label"][0]} for r in ROWS]
    work.train(options(tmp_path / "other"), source=rows)
    words = ["compare", str(arms / "a0"), str(tmp_path / "other"), "--data", str(arms / "data")]
    assert cli.run([*words, "--out", str(tmp_path / "o")]) == 2
    assert "has other classes" in capsys.readouterr().err


PLAIN = """
import sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
if sys.argv[2] == "lora":
    from peft import PeftModel
    how = {"num_labels": 3, "ignore_mismatched_sizes": True}
    base = AutoModelForSequenceClassification.from_pretrained(sys.argv[3], **how)
    model = PeftModel.from_pretrained(base, sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[3])
else:
    model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    assert model.config.id2label[2] == "warm", model.config.id2label
assert "kilobayes" not in sys.modules
tokens = tokenizer(sys.argv[5:], padding=True, return_tensors="pt")
from safetensors.torch import save_file
with torch.no_grad():
    save_file({"logits": model.eval()(**tokens).logits}, sys.argv[4])
"""


@pytest.mark.parametrize(("run", "member"), [("a0", 0), ("b", 1)])
@pytest.mark.parametrize("to", ["lora", "merged"])
def test_exports_load_without_kilobayes(arms: Path, tmp_path: Path, run: str, member: int, to: str) -> None:
    from safetensors.torch import load_file

    words = ["export", str(arms / run), "--to", to, "--out", str(tmp_path / "e"), "--member", str(member)]
    assert cli.run(words) == 0
    fitted = load(arms / run)
    texts = [r["text"] for r in ROWS[:9]]
    encoded = fitted.encode(load_examples(texts, need_labels=False))
    mean = tree.member(fitted.posterior.mean(fitted.state), member)
    expected = logits(fitted.model, mean, fitted.task, encoded)[0]
    command = [
        sys.executable,
        "-c",
        PLAIN,
        str(tmp_path / "e"),
        to,
        small.base(),
        str(tmp_path / "l"),
        *texts,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "l")["logits"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
