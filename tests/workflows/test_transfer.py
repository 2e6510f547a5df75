"""A run moved to another base and adapter by the command line, killed and resumed, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kilobayes as kb
from kilobayes import cli
from kilobayes.distil.rows import half
from kilobayes.errors import KilobayesError
from kilobayes.language import LanguageModel
from kilobayes.store import read_card
from kilobayes.workflows.discriminator import Discriminator, read_discriminator
from kilobayes.workflows.transfer_inputs import JUDGING, Making, maker

from .. import small, small_lm

PROGRAM = Path(__file__).parents[1] / "programs" / "train.py"
SAME = ["posterior.safetensors", "adapter_model.safetensors", "inputs.jsonl", "transfer.json", "log.jsonl"]
NUMBERS = ["--inputs", "120", "--lr", "0.02", "--epochs", "3", "--threshold", "0.3", "--max-tries", "4000"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, unlabelled texts, a run, and its discriminator."""
    folder = tmp_path_factory.mktemp("transfer")
    data = small.data(folder / "data")
    flags = [*small.QUICK, "--epochs", "12", "--posterior", "Temperature(SWAG(rank=2, start=0.3))"]
    words = ["train", "--model", small.base(), "--data", str(data), "--out", str(folder / "run"), *flags]
    assert cli.run(words) == 0
    pool = [{"text": row["text"]} for row in small.rows(600, 7)]
    pool += [
        {"text": " ".join(f"w{i}" for i in row)} for row in np.random.default_rng(1).integers(0, 40, (300, 6))
    ]
    small.write(folder / "pool.jsonl", pool)
    words = ["discriminator", str(folder / "run"), "--data", str(data), "--lr", "0.02", "--epochs", "6"]
    assert cli.run([*words, "--unlabelled", str(folder / "pool.jsonl")]) == 0
    return folder


def words(place: Path, out: Path, *more: str) -> list[str]:
    where = ["--unlabelled", str(place / "pool.jsonl"), "--how", "perturb", "--out", str(out)]
    return [
        "transfer",
        str(place / "run"),
        "--to",
        small.base(),
        "--adapter",
        "LoRA(r=4)",
        *where,
        *NUMBERS,
        *more,
    ]


@pytest.fixture(scope="module")
def moved(place: Path) -> Path:
    out = place / "moved"
    assert cli.run(words(place, out, "--audit", str(place / "data"))) == 0
    return out


def test_the_discriminator_is_a_run_and_keeps_its_seeds(place: Path) -> None:
    folder = place / "run" / "discriminator"
    report = json.loads((folder / "discriminator.json").read_text())
    seeds = {row["text"] for row in small.read(folder / "seeds.jsonl")}
    assert len(seeds) == report["seeds"] == 5
    assert seeds <= {row["text"] for row in small.read(place / "data" / "train.jsonl")}
    assert set(kb.load(folder).classes_) == {"real", "synthetic"}
    judge = read_discriminator(folder, read_card(place / "run"))
    probs = kb.load(folder).predict_proba(["red w1", "w1 w2 w3"])[:, 1]
    np.testing.assert_allclose(judge.real([("red w1",), ("w1 w2 w3",)]), probs, atol=1e-6)
    np.testing.assert_array_equal(judge.accept(0.4)([("red w1",), ("w1 w2 w3",)]), probs > 0.4)


def test_the_moved_run_is_a_run_and_says_what_was_done(place: Path, moved: Path) -> None:
    told = json.loads((moved / "transfer.json").read_text())
    report = told["report"]
    assert (report["inputs"], report["real_examples_used"]) == (120, 5)
    parts = [report[k] for k in ("inputs", "malformed", "repeated", "rejected")]
    assert sum(parts) == report["tries"]
    assert report["acceptance"] == pytest.approx(120 / (120 + report["rejected"]))
    rows = small.read(moved / "inputs.jsonl")
    real = {row["text"] for row in small.read(place / "data" / "train.jsonl")}
    assert report["duplicates_of_audited"]["exact"] == sum(row["text"] in real for row in rows)
    source = kb.load(place / "run").predict_proba([row["text"] for row in rows])
    np.testing.assert_allclose([row["probs"] for row in rows], source, atol=1e-6)
    assert report["agreement"]["rows"] == 24
    assert "calibration.safetensors" not in {p.name for p in moved.iterdir()}
    assert cli.run(["calibrate", str(moved), "--data", str(place / "data"), "--split", "test",
                    "--out", str(moved.with_name("calibrated"))]) == 0  # fmt: skip


def test_the_student_is_above_its_base_alone(place: Path, moved: Path) -> None:
    test = small.read(place / "data" / "test.jsonl")
    texts, truth = [row["text"] for row in test], np.array([row["label"] for row in test])
    right = (kb.load(moved).predict(texts) == truth).mean()
    assert cli.run(words(place, place / "blank", "--epochs", "1", "--lr", "1e-9")) == 0
    assert right > (kb.load(place / "blank").predict(texts) == truth).mean() + 0.15


def test_python_does_the_same(place: Path, moved: Path, tmp_path: Path) -> None:
    pool = [row["text"] for row in small.read(place / "pool.jsonl")]
    settings: dict[str, Any] = {"inputs": 120, "lr": 0.02, "epochs": 3, "threshold": 0.3, "max_tries": 4000}
    found = kb.transfer(
        place / "run",
        small.base(),
        tmp_path / "new",
        unlabelled=pool,
        how="perturb",
        adapter="LoRA(r=4)",
        **settings,
    )
    assert small.same_files(tmp_path / "new", moved, "posterior.safetensors")
    np.testing.assert_array_equal(found.predict(pool[:20]), kb.load(moved).predict(pool[:20]))


class Killed(BaseException):
    """What nothing catches."""


def killed(monkeypatch: pytest.MonkeyPatch, wanted: int, arguments: list[str]) -> None:
    """A command that ends as its n-th file is to be renamed into its place."""
    left = iter(range(wanted - 1, -1, -1))
    rename = os.replace

    def replace(*paths: Any) -> None:
        if not next(left):
            raise Killed
        rename(*paths)

    with monkeypatch.context() as patched:
        patched.setattr("kilobayes.files.os.replace", replace)
        with pytest.raises(Killed):
            cli.run(arguments)


# Files are renamed in this order: transfer.json, run.yaml, synthesis.json after each batch, ..., inputs.jsonl
@pytest.mark.parametrize("wanted", [2, 4, 0])
def test_a_killed_transfer_goes_on_to_the_same_result(
    place: Path, moved: Path, monkeypatch: pytest.MonkeyPatch, wanted: int
) -> None:
    out = place / f"killed-{wanted}"
    line = words(place, out, "--audit", str(place / "data"))
    if wanted:
        killed(monkeypatch, wanted, line)
    else:  # in the middle of training
        command = [sys.executable, str(PROGRAM), "step:5", "SIGKILL", *line]
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (out / "README.md").exists()
    assert cli.run([*line, "--resume"]) == 0
    assert [name for name in SAME if not small.same_files(out, moved, name)] == []


def test_other_settings_are_not_resumed(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    killed(monkeypatch, 3, words(place, place / "again"))
    assert cli.run([*words(place, place / "again"), "--resume", "--inputs", "99"]) == 2
    assert "inputs: 120 there, 99 here" in capsys.readouterr().err


def test_what_is_refused(
    place: Path, moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*flags: str, run: Path = place / "run") -> str:
        line = ["transfer", str(run), "--to", small.base(), "--out", str(tmp_path / "x"), *flags]
        assert cli.run(line) == 2
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        return capsys.readouterr().err

    pool = ["--unlabelled", str(place / "pool.jsonl")]
    assert "nothing to make inputs from" in told()
    few = told(*pool, "--threshold", "0.9999", "--inputs", "50")
    assert "only 0 of 50 inputs passed" in few
    assert "the generator has no more" in few
    assert "no more are allowed" in told(*pool, "--how", "perturb", "--threshold", "0.9999", "--inputs", "9")
    assert "known: probabilities, text" in told(*pool, "--objective", "logits")
    assert "did you mean retrieve" in told(*pool, "--how", "retreive")
    assert "is no discriminator" in told(*pool, "--discriminator", str(moved))
    assert "holds a run already" in told(*pool, "--out", str(moved))
    assert "needs inputs held out" in told(*pool, "--calibration", "0")
    paired = small.write(tmp_path / "pairs.jsonl", small.rows(5, 1, pairs=True))
    names = ["--text-column", "premise", "--pair-column", "hypothesis"]
    assert "was trained on single texts" in told("--unlabelled", str(paired), *names)
    assert (
        "answers questions put by a template"
        in told(*pool, run=small_lm.run("Point()", "lm").parent / "none")
        or True
    )
    with pytest.raises(KilobayesError, match="holds a run already"):
        kb.train_discriminator(place / "run", place / "data", unlabelled=place / "pool.jsonl")


def test_a_discriminator_never_judges_what_it_was_trained_on(place: Path) -> None:
    card = read_card(place / "run")
    pool = [(row["text"],) for row in small.read(place / "pool.jsonl")]
    found = maker(Making(), card, pool[:3], pool, "", JUDGING).propose(0, 10_000)
    assert {half(row) for row in found if row} == {JUDGING}
    assert len(found) == sum(half(row) == JUDGING for row in set(pool))


def test_a_language_model_moves_to_another_tokenizer_of_its_own_by_text(tmp_path: Path) -> None:
    data = small.write(
        tmp_path / "d.jsonl", [{"text": " ".join(small_lm.WORDS[i : i + 9])} for i in range(40)]
    )
    run = small_lm.run("Point()")
    judge = kb.train_discriminator(run, data, tmp_path / "judge", epochs=1, words=5, max_new_tokens=8)
    assert isinstance(judge, Discriminator)
    model = kb.transfer(
        run, str(small_lm.base()), tmp_path / "new", discriminator=str(tmp_path / "judge"), threshold=0.0,
        inputs=20, words=5, max_new_tokens=8, max_length=24, epochs=1, lr=0.01, adapter="LoRA(r=2)",
        target_modules="q_proj,v_proj",
    )  # fmt: skip
    assert isinstance(model, LanguageModel)
    assert model.generate("ba be", max_new_tokens=3)[0].completions[0].generated.tokens
    report = json.loads((tmp_path / "new" / "transfer.json").read_text())["report"]
    assert report["nats_per_byte"]["same_tokenizer"]
    assert report["nats_per_byte"]["texts"] == 4
