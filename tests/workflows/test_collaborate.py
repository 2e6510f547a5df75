"""A collaboration from data to a folder of runs, killed and gone on with, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kilobayes as kb
from kilobayes.checkpoint import Checkpoint
from kilobayes.cli import run
from kilobayes.collaboration.settings import Together
from kilobayes.errors import KilobayesError
from kilobayes.options import Options
from kilobayes.workflows import users
from kilobayes.workflows.collaborate import collaborate
from kilobayes.workflows.data import reads
from kilobayes.workflows.finetune import load
from tests import small, small_choice, small_lm

TWIST = {"warm": "cold", "cold": "fresh", "fresh": "warm"}  # another meaning of the same words


class Killed(Exception):
    pass


def people(folder: Path, foreign: bool = False) -> Path:
    """Users a and b of one kind, a file each; c, whose labels mean something else, a folder with a test."""
    for name, seed in (("a", 1), ("b", 2)):
        small.write(folder / f"{name}.jsonl", small.rows(60, seed))
    rows = [small.rows(60, 3), small.rows(40, 4)]
    twisted = [[row | {"label": TWIST[row["label"]]} for row in part] for part in rows]
    for name, part in zip(("train", "test"), twisted if foreign else rows):
        small.write(folder / "c" / f"{name}.jsonl", part)
    return folder


def settings(out: Path, **more: Any) -> tuple[Options, Together]:
    options: dict[str, Any] = {
        "model": small.base(),
        "adapter": "LoRA(r=2)",
        "posterior": "Point()",
        "lr": 0.03,
    }
    together: dict[str, Any] = {"steps": 24, "warmup_steps": 8, "every": 8, "scheme": "validation"}
    for key, value in more.items():
        (together if key in Together.__dataclass_fields__ else options)[key] = value
    options["posterior"] = "Point()"
    return Options(**options | {"batch_size": 16, "max_length": 24, "out": str(out)}), Together(**together)


def finished(folder: Path) -> dict[str, bytes]:
    files = [folder / "rounds.jsonl", folder / "metrics.json", *folder.glob("users/*/posterior.safetensors")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def test_killed_anywhere_it_goes_on_to_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = people(tmp_path / "people")
    collaborate(*settings(tmp_path / "whole"), folder)
    expected = finished(tmp_path / "whole")
    change = Checkpoint.change
    for kill in (3, 19, "adopting"):
        part = tmp_path / f"part-{kill}"

        def watch(progress: Any, losses: Any, at: Any = kill) -> None:
            if progress.step == at:
                raise Killed

        def killed(self: Checkpoint, changed: Any) -> None:
            if int(self.read()["step"]) == 16:  # the round's line is written, its leaves are not adopted
                raise Killed
            change(self, changed)

        if kill == "adopting":
            monkeypatch.setattr(Checkpoint, "change", killed)
        with pytest.raises(Killed):
            collaborate(*settings(part), folder, watch=watch)
        monkeypatch.setattr(Checkpoint, "change", change)
        if kill != 3:  # by then there was nothing to go on with
            with pytest.raises(KilobayesError, match="unfinished"):
                collaborate(*settings(part), folder)
        collaborate(*settings(part, resume=True), folder)
        assert finished(part) == expected
    with pytest.raises(KilobayesError, match="finished"):
        collaborate(*settings(part, resume=True), folder)


@pytest.mark.parametrize("scheme", ["validation", "predictions"])
def test_a_user_of_other_data_is_trusted_less(tmp_path: Path, scheme: str) -> None:
    reference = small.write(tmp_path / "shared.jsonl", [{"text": r["text"]} for r in small.rows(30, 8)])
    done = collaborate(
        *settings(tmp_path / "out", scheme=scheme, reference=str(reference), steps=40, warmup_steps=24),
        people(tmp_path / "people", foreign=True),
    )
    w = done.trust[-1].numpy()
    np.testing.assert_allclose(done.trust.sum(dim=2), 1.0, atol=1e-5)
    assert w[0, 2] < 0.5 * w[0, 1]
    assert w[1, 2] < 0.5 * w[1, 0]
    assert w[2, 2] > 0.5
    lines = small.read(tmp_path / "out" / "rounds.jsonl")
    assert [line["step"] for line in lines] == [24, 32, 40]
    update = lines[0]["down_bytes"][0] // (3 if scheme == "validation" else 1)
    sent = 24 if scheme == "validation" else 30 * 3 * 2  # doubles of losses; halves of predictions
    assert lines[0]["up_bytes"] == [update + sent] * 3
    page = (tmp_path / "out" / "README.md").read_text()
    assert done.worst in page
    assert "| **mean** |" in page
    assert "<svg" in (tmp_path / "out" / "trust.svg").read_text()
    # each user's run predicts, with sets from its own rows, and scores on its test rows what was reported
    loaded = kb.load(tmp_path / "out" / "users" / "c")
    test = small.read(tmp_path / "people" / "c" / "test.jsonl")
    probs = loaded.predict_proba([row["text"] for row in test])
    right = [list(loaded.classes_).index(row["label"]) for row in test]
    nll = -np.log(probs[np.arange(len(test)), right]).mean()
    assert nll == pytest.approx(done.figures[2]["nll"], abs=1e-4)
    assert (tmp_path / "out" / "users" / "c" / "calibration.safetensors").exists()


def test_users_who_write_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, at in (("x", 0), ("y", 20)):
        rows = [" ".join(small_lm.WORDS[(at + i + j) % 60] for j in range(8)) for i in range(24)]
        (tmp_path / "people").mkdir(exist_ok=True)
        small.write(tmp_path / "people" / f"{name}.jsonl", [{"text": row} for row in rows])
    yaml = tmp_path / "run.yaml"
    yaml.write_text(
        f"users: {tmp_path / 'people'}\ntask: lm\nmodel: {small_lm.base()}\nscheme: fedavg\nsteps: 6\n"
        "warmup_steps: 2\nevery: 2\nadapter: LoRAXS(r=2)\ntarget_modules: q_proj,v_proj\nmax_length: 16\n"
    )
    out = tmp_path / "out"
    assert run(["collaborate", str(yaml), "--out", str(out), "--scheme", "weights", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told["users"]) == {"x", "y"}
    assert told["users"]["x"]["perplexity"] > 1.0
    assert {line["average"] for line in small.read(out / "rounds.jsonl")} == {"leaves"}
    assert run(["generate", str(out / "users" / "x"), "--prompt", "ba be", "--max-new-tokens", "3"]) == 0
    assert (
        run(["collaborate", str(out / "collaborate.yaml"), "--out", str(tmp_path / "again"), "--json"]) == 0
    )
    assert finished(out) == finished(tmp_path / "again")


@pytest.mark.parametrize("kind", ["decoders that choose", "sparse rows"])
def test_figures_are_those_of_the_runs_that_users_get(tmp_path: Path, kind: str) -> None:
    """Also of rows that are scored by options, and of averages that are denser than what is kept of them."""
    folder, rows = tmp_path / "people", small_choice.questions if kind.startswith("dec") else small.rows
    for seed, name in enumerate("ab"):
        for split, count in (("train", 60), ("test", 20)):
            small.write(folder / name / f"{split}.jsonl", rows(count, 2 * seed + (split == "test")))
    if kind.startswith("dec"):
        given: dict[str, Any] = {"model": small_choice.base(), "task": "choice", "adapter": "LoRA(r=2)"}
    else:
        given = {"model": small.base(), "adapter": "RoseLoRA(r=2, keep=0.2, end=0.5)", "average": "leaves"}
    given |= {"steps": 6, "warmup_steps": 2, "every": 2, "scheme": "validation", "lr": 0.02}
    done = kb.collaborate(folder, tmp_path / "out", posterior="Point()", device="cpu", **given)
    for name, figures in zip("ab", done.figures, strict=True):
        own = load(tmp_path / "out" / "users" / name)
        table = reads(own.card)(folder / name, "test", classes=own.card.classes)
        probs, labels = own.predict(table).probs.numpy(), np.array(table.labels)
        assert figures["nll"] == pytest.approx(-np.log(probs[np.arange(len(labels)), labels]).mean(), 1e-4)


def test_in_python(tmp_path: Path) -> None:
    rows = {name: small.rows(40, seed) for seed, name in enumerate("ab")}
    done = kb.collaborate(
        rows, tmp_path / "out", "oracle", kinds="one,other", model=small.base(), adapter="LoRA(r=2)",
        steps=2, warmup_steps=1, every=1, max_length=24,
    )  # fmt: skip
    assert done.trust[-1].tolist() == [[1.0, 0.0], [0.0, 1.0]]
    with pytest.raises(KilobayesError, match="did you mean scheme"):
        kb.collaborate(rows, tmp_path / "b", shceme="local")
    with pytest.raises(KilobayesError, match="2 users need 2 kinds"):
        kb.collaborate(rows, tmp_path / "b", "oracle", kinds="one")


def test_rows_of_users(tmp_path: Path) -> None:
    folder = people(tmp_path / "people")
    found = users.read(Options(seed=3), users.listed(folder))
    own = found["a"]
    assert (len(own.train), len(own.trust), len(own.test)) == (48, 6, 6)
    assert not {*own.trust.texts} & {*own.test.texts} or len(set(own.trust.texts)) < 6
    assert (len(found["c"].train), len(found["c"].trust), len(found["c"].test)) == (48, 12, 40)
    two = [row for row in small.rows(60, 5) if row["label"] != "fresh"]
    found = users.read(Options(), {"a": small.rows(60, 1), "b": two})
    assert found["b"].train.classes == ["cold", "fresh", "warm"]
    assert users.lacking(found) == ["b: no training rows of fresh."]


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = people(tmp_path / "people")
    other = small.write(tmp_path / "other.jsonl", [{"text": "x", "label": c} for c in "pq" * 8])
    lone = small.write(tmp_path / "lone" / "a.jsonl", small.rows(9))
    given = ["--out", str(tmp_path / "out"), "--model", small.base()]
    (tmp_path / "bad.yaml").write_text(f"users:\n  a: {folder}/a.jsonl\n  b: {folder}/missing.jsonl\n")
    (tmp_path / "odd.yaml").write_text(f"users:\n  a: {folder}/a.jsonl\n  b: {other}\n")
    for words, arguments in (
        ("no users are named", []),
        ("did you mean", ["--users", str(tmp_path / "peopel")]),
        ("at least two users", ["--users", str(lone.parent)]),
        ("the data of user b are missing", [str(tmp_path / "bad.yaml")]),
        ("has no class in common", [str(tmp_path / "odd.yaml")]),
        ("did you mean predictions", ["--users", str(folder), "--scheme", "prediction"]),
        ("needs shared rows", ["--users", str(folder), "--scheme", "predictions"]),
        ("told which users", ["--users", str(folder), "--scheme", "oracle"]),
        ("there is no gone.jsonl", ["--users", str(folder), "--reference", "gone.jsonl"]),
        ("draws need variances", ["--users", str(folder), "--draws", "3"]),
        ("every must be at least 1", ["--users", str(folder), "--every", "0"]),
        ("No such option", ["--users", str(folder), "--epochs", "3"]),
    ):
        assert run(["collaborate", *arguments, *given]) == 2, words
        shown = " ".join(capsys.readouterr().err.split())
        assert words in shown, shown
    assert not (tmp_path / "out").exists()
    (tmp_path / "epochs.yaml").write_text(f"users: {folder}\nepochs: 3\n")
    assert run(["collaborate", str(tmp_path / "epochs.yaml")]) == 2
    assert "steps says how long" in capsys.readouterr().err
