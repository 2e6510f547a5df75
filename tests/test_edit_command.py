"""``kilobayes edit``: a folder with edits that ``generate`` takes, undoing them, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kilobayes.cli import run

from . import small_lm
from .small import read, write

ROWS = [
    {"prompt": "ba de", "target_new": "fi go", "locality_prompt": "so", "locality_ground_truth": "tu"},
    {"prompt": "ku la", "target_new": "po"},
]
TRAIN = [
    "--adapter",
    "LoRA(r=4)",
    "--steps",
    "30",
    "--lr",
    "0.1",
    "--target-modules",
    "v_proj",
    "--new-tokens",
    "4",
]


def edit(folder: Path, *more: str) -> int:
    facts = write(folder / "facts.jsonl", ROWS)
    given = [
        "edit",
        str(small_lm.base()),
        "--facts",
        str(facts),
        "--out",
        str(folder / "out"),
        "--device",
        "cpu",
    ]
    return run([*given, *TRAIN, *more])


def test_edit_generate_undo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert edit(tmp_path, "--json") == 0
    out, err = capsys.readouterr()
    told, place = json.loads(out), tmp_path / "out"
    assert "success" in err
    means = json.loads((place / "metrics.json").read_text(encoding="utf-8"))
    assert means == {k: v for k, v in told.items() if k != "run"}
    assert means["then_free"] == means["then_teacher"] == 1.0
    records = read(place / "edits.jsonl")
    assert [r["target"] for r in records] == ["fi go", "po"]
    assert means["success_free"] == sum(r["success_free"] for r in records) / 2
    assert means["locality_teacher"] == records[0]["locality_teacher"]
    assert records[1]["locality_teacher"] is None
    assert "2 edits of" in (place / "README.md").read_text(encoding="utf-8")
    assert not list(place.rglob("*.bin"))

    def says(prompt: str) -> Any:
        name, asked = str(place / "adapter"), ["--max-new-tokens", "1", "--device", "cpu", "--json"]
        assert run(["generate", name, "--prompt", prompt, *asked]) == 0
        return json.loads(capsys.readouterr().out)["completions"][0]["text"].strip()

    assert says("ku la") == "po"
    assert edit(tmp_path) == 2
    assert "holds edits already" in capsys.readouterr().err
    assert run(["edit", "--undo", str(place), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"run": str(place), "undone": 1, "edits": 1}
    assert says("ba de") == "fi"
    assert len(read(place / "edits.jsonl")) == 1
    assert run(["edit", "--undo", str(place), "--last", "2"]) == 2
    assert "2 edits cannot be undone" in capsys.readouterr().err


def test_single_edits_have_an_adapter_each(tmp_path: Path) -> None:
    assert edit(tmp_path, "--single", "--limit", "1") == 0
    means = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert (means["mode"], means["edits"], means["success_free"]) == ("single", 1, 1.0)
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a model is missing"),
        (["--undo"], "a folder of edits is missing"),
        (["model"], "no facts to edit"),
        (["--undo", "nowhere"], "holds no edits"),
        (["--undo", "nowhere", "--facts", "x.jsonl"], "takes a folder of edits alone"),
        (["model", "--facts", "x.jsonl", "--lr", "0"], "--lr must be above 0"),
        (["model", "--facts", "x.jsonl", "--steps", "0"], "--steps"),
        (["model", "--facts", "x.jsonl"], "cannot read"),
    ],
)
def test_bad_input(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["edit", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_answer_the_tokenizer_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": "ba", "target_new": "elsewhere"}
    facts = write(tmp_path / "facts.jsonl", [ROWS[0], row])
    given = ["edit", str(small_lm.base()), "--facts", str(facts), "--out", str(tmp_path / "out")]
    assert run(given) == 2
    assert "edit 2: the tokenizer does not know" in capsys.readouterr().err
