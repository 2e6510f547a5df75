"""Language models side by side: the command, the files, and the texts that are shown."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import kilobayes as kb
from kilobayes.cli import run as command
from kilobayes.errors import KilobayesError
from kilobayes.tasks.text import Documents
from kilobayes.workflows import language_evaluate
from kilobayes.workflows.language import load
from kilobayes.workflows.language_evaluate import SHOWN, evaluate

from .. import small_lm

TEXTS = ["ba be bi bo bu " * 12, "da de di do du", "fa fe fi " * 30]
ELSEWHERE = ["lu lo li le la " * 3, "su so si"]


@pytest.fixture(scope="module")
def runs() -> list[Path]:
    return [small_lm.run("Point()"), small_lm.run()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, texts in (("test", TEXTS), ("ood", ELSEWHERE)):
        lines = "\n".join(json.dumps({"text": t}) for t in texts)
        (folder / f"{name}.jsonl").write_text(lines + "\n", encoding="utf-8")
    return folder


def test_the_command_compares_runs_and_writes_both_files(
    runs: list[Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = [
        "--data",
        str(data / "test.jsonl"),
        "--ood",
        str(data / "ood.jsonl"),
        "--out",
        str(out),
        "--json",
    ]
    assert command(["compare", *map(str, runs), *flags]) == 0
    shown = capsys.readouterr()
    assert "less the first, by documents" in shown.err
    printed = json.loads(shown.out)["runs"]
    (first, second) = json.loads((out / "metrics.json").read_text())["runs"]
    assert first["documents"] == 3
    gap = second["metrics"]["nll"]["value"] - first["metrics"]["nll"]["value"]
    assert second["less_first"]["nll"]["value"] == pytest.approx(gap)
    assert printed[1]["less_first"]["nll"][0] == pytest.approx(gap, abs=1e-6)
    assert first["metrics"]["mutual_information"]["value"] == 0.0  # of a point
    assert second["metrics"]["mutual_information"]["value"] > 0.0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert 'id="paired"' in page
    assert 'title="probability' in page


def test_in_python_and_what_is_refused(runs: list[Path], data: Path, tmp_path: Path) -> None:
    found = kb.compare([runs[1]], Documents("text", TEXTS), out=tmp_path / "a", limit=2)
    assert len(found.evaluations[0].scores.bytes) == 2
    assert found.less_first == []
    with pytest.raises(KilobayesError, match="named twice"):
        kb.compare([runs[0], runs[0]], Documents("text", TEXTS), out=tmp_path / "b")
    with pytest.raises(KilobayesError, match="is no kilobayes run"):
        kb.compare([tmp_path / "nothing"], Documents("text", TEXTS), out=tmp_path / "c")


def test_excerpts_are_the_texts_with_their_own_scores(runs: list[Path]) -> None:
    fitted = load(runs[0])
    found = evaluate(fitted, Documents("text", TEXTS), Documents("text", ELSEWHERE))
    inside = [one for one in found.excerpts if not one.outside]
    # the first text is cut into windows; its last one is shorter, so it was scored before
    assert "".join(inside[0].pieces).split() == ["<s>", *TEXTS[0].split(), "</s>"]
    assert np.isnan(inside[0].nll[0])
    assert np.array_equal(inside[0].nll[1:], found.scores.nll[found.scores.document == 0].astype(float))
    alone = fitted.scores(Documents("text", TEXTS[:1]))
    assert inside[0].nll[1:] == pytest.approx(alone.nll, abs=1e-4)
    assert sum(int((~np.isnan(one.nll)).sum()) for one in inside) <= SHOWN
    assert [len(one.pieces) for one in found.excerpts if one.outside] == [17, 5]


def test_of_what_was_read_before_an_answer_the_end_is_shown(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_evaluate, "READ", 5)
    rows = Documents("pairs", [(" ".join(["ba be"] * 14), " da de"), ("ba", " di")])
    found = evaluate(load(runs[0]), rows).excerpts
    assert "".join(found[0].pieces).split() == ["be", "ba", "be", "ba", "be", "da", "de", "</s>"]
    assert np.isnan(found[0].nll).tolist() == [True] * 5 + [False] * 3
