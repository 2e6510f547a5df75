"""Runs of language models: from texts to a folder, resumed, loaded, evaluated; and on a real model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kilobayes.cli import run as command
from kilobayes.errors import KilobayesError
from kilobayes.options import Options
from kilobayes.tasks.text import Documents, load_documents
from kilobayes.workflows.language import fit_documents, load, sampling
from kilobayes.workflows.language_run import train

from .. import small_bytes


def data(folder: Path) -> Path:
    """Splits of short texts."""
    for name, count, shift in (("train", 24, 0), ("test", 6, 3)):
        lines = [json.dumps({"text": t}) for t in small_bytes.texts(count, shift)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def options(tmp_path: Path, **changed: Any) -> Options:
    settings: dict[str, Any] = {
        "data": str(tmp_path), "model": small_bytes.base(), "task": "lm", "out": str(tmp_path / "run"),
        "adapter": "LoRA(r=2)", "epochs": 2, "batch_size": 6, "lr": 0.02, "max_length": 24, "samples": 3,
        "calibration": "4",
    }  # fmt: skip
    return Options(**settings | changed)


def test_a_run_is_written_loaded_and_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data(tmp_path)
    done = train(options(tmp_path, posterior="Temperature(SWAG(rank=2, snapshots=4))"))
    found = json.loads((done.folder / "metrics.json").read_text())
    assert found["task"] == "lm"
    assert json.loads((done.folder / "posterior.json").read_text())["task"] == "lm"
    (told,) = found["runs"]
    value, low, high = (told["metrics"]["nll"][part] for part in ("value", "low", "high"))
    assert low <= value <= high
    assert told["metrics"]["perplexity"]["value"] == pytest.approx(np.exp(value), rel=1e-4)
    assert told["bytes"] == sum(len(t.encode()) for t in small_bytes.texts(6, 3))
    assert told["tokens"] == told["bytes"] + 6  # a byte a token, and the ends
    assert "| bits per byte |" in (done.folder / "README.md").read_text()
    again = load(done.folder)
    test = load_documents(tmp_path, "test")
    assert np.array_equal(again.scores(test).nll, done.fitted.scores(test).nll)
    capsys.readouterr()
    assert command(["evaluate", str(done.folder), "--data", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["metrics"]["nll"][0] == pytest.approx(value, abs=1e-6)
    assert printed["split"] == "test"


def test_the_command_line_checks_trains_and_generates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = options(data(tmp_path), posterior="Point()", epochs=1)
    names = ("data", "model", "task", "out", "adapter", "epochs", "posterior", "max_length", "calibration")
    flags = [f"--{n.replace('_', '-')}={getattr(made, n)}" for n in names]
    assert command(["check", *flags, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["form"], told["training_rows"], told["test_split"]) == ("text", 20, "test")
    assert command(["train", *flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["bits_per_byte"][0] > 0
    assert command(["generate", made.out, "--prompt", "ab", "--max-new-tokens", "3"]) == 0
    assert (
        command(
            [
                "evaluate",
                made.out,
                "--data",
                str(tmp_path),
                "--ood",
                str(tmp_path),
                "--out",
                str(tmp_path / "e"),
            ]
        )
        == 0
    )
    (told,) = json.loads((tmp_path / "e" / "metrics.json").read_text())["runs"]
    assert "ood_auroc" in told["metrics"]
    assert "Out of distribution" in (tmp_path / "e" / "report.html").read_text()


def test_training_lowers_the_loss_and_packing_loses_nothing(tmp_path: Path) -> None:
    data(tmp_path)
    rows, test = load_documents(tmp_path, "train"), load_documents(tmp_path, "test")
    before = fit_documents(options(tmp_path, posterior="Point()", lr=1e-9, epochs=1), rows, None)
    for packing in (False, True):
        after = fit_documents(options(tmp_path, posterior="Point()", packing=packing), rows, None)
        assert after.scores(test).nll.mean() < before.scores(test).nll.mean() - 0.05
        assert after.tokens is not None
        assert after.tokens.packed == packing


def test_a_killed_run_goes_on_to_the_same(tmp_path: Path) -> None:
    data(tmp_path)
    whole = train(options(tmp_path, posterior="SWAG(rank=2, snapshots=4)"))

    def stop(progress: Any, loss: torch.Tensor) -> None:
        if progress.step == 5:
            raise KeyboardInterrupt

    killed = options(tmp_path, posterior="SWAG(rank=2, snapshots=4)", out=str(tmp_path / "other"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kilobayes.checkpoint.Checkpoint.due", lambda self, progress: True)
        with pytest.raises(KeyboardInterrupt):
            train(killed, watch=stop)
    resumed = train(
        options(tmp_path, posterior="SWAG(rank=2, snapshots=4)", out=str(tmp_path / "other"), resume=True)
    )
    for name in ("posterior.safetensors", "adapter_model.safetensors"):
        ours, theirs = load_file(whole.folder / name), load_file(resumed.folder / name)
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    lines = [(f / "log.jsonl").read_text() for f in (whole.folder, resumed.folder)]
    assert lines[0] == lines[1]


def test_what_would_be_linearised_is_sampled(tmp_path: Path) -> None:
    from kilobayes import spec

    assert repr(sampling(spec.posterior("Temperature(Laplace())"))).count("linearised=False") == 1
    rows = Documents("text", small_bytes.texts(12))
    made = options(tmp_path, posterior="Laplace(structure='diag')", epochs=1)
    fitted = fit_documents(made, rows, Documents("text", small_bytes.texts(4, 2)))
    assert torch.isfinite(fitted.state.precision).all()
    assert (fitted.scores(rows).information > 0).any()


def test_answers_alone_are_learned_from_pairs(tmp_path: Path) -> None:
    rows = Documents("pairs", [(f"{i}:", "yes" if i % 2 else "no") for i in range(20)])
    fitted = fit_documents(options(tmp_path, posterior="Point()"), rows, None)
    scores = fitted.scores(rows)
    assert len(scores.nll) == 10 * 4 + 10 * 3
    assert int(scores.bytes.sum()) == 10 * 3 + 10 * 2


def test_bad_input_is_refused(tmp_path: Path) -> None:
    data(tmp_path)
    with pytest.raises(KilobayesError, match="needs rows to calibrate on"):
        train(options(tmp_path, posterior="Temperature()", calibration="0", out=str(tmp_path / "none")))
    assert not (tmp_path / "none").exists()
    with pytest.raises(KilobayesError, match="no data is named"):
        train(options(tmp_path, data=""))
    adapted = options(tmp_path, posterior="Point()", target_modules="lm_head")
    with pytest.raises(KilobayesError, match="output layer out of --target-modules"):
        fit_documents(adapted, load_documents(tmp_path, "train"), None)


@pytest.mark.skipif(
    not os.environ.get("KILOBAYES_DATA") or not os.environ.get("KILOBAYES_MODELS"),
    reason="KILOBAYES_DATA and KILOBAYES_MODELS name no folders",
)
def test_a_few_steps_on_real_stories_lower_the_held_out_loss(tmp_path: Path) -> None:
    source = Path(os.environ["KILOBAYES_DATA"]) / "fairytale_stories"
    rows, held = load_documents(source, "train").take(range(12)), load_documents(source, "validation")
    held = Documents("text", [t[:400] for t in held.rows[:4]])
    made = options(
        tmp_path, model=str(Path(os.environ["KILOBAYES_MODELS"]) / "stories260K"), max_length=128,
        posterior="Point()", epochs=1, batch_size=4, adapter="LoRA(r=8)", lr=5e-3,
    )  # fmt: skip
    after = fit_documents(made, rows, None)
    unchanged = load_causal_scores(made, held)
    assert after.scores(held).nll.mean() < unchanged - 0.05


def load_causal_scores(made: Options, held: Documents) -> float:
    """Mean NLL of the base as it is."""
    from kilobayes.models import load_causal
    from kilobayes.tasks.lm import Language
    from kilobayes.tasks.packing import IGNORED

    base = load_causal(made.model)
    tokens = Language(base.tokenizer, made.max_length).encode(held)
    total = 0.0
    with torch.no_grad():
        for ids, labels in zip(tokens.ids, tokens.labels, strict=True):
            scores = base.model(input_ids=torch.tensor([ids])).logits[0]
            total += float(torch.nn.functional.cross_entropy(scores, torch.tensor(labels), reduction="sum"))
            assert IGNORED not in labels
    return total / sum(tokens.counted)


@pytest.mark.parametrize(
    "posterior",
    [
        "BLoB()", "MonteCLoRA()", "IVON()", "MCDropout(noise='token')", "ASWA()", "TFB(samples=2, rows=64)",
        "Scale(SWAG(rank=2, snapshots=4))", "Temperature(Ensemble(MCDropout(), members=2))",
    ],
)  # fmt: skip
def test_every_posterior_is_trained_and_scores_tokens(tmp_path: Path, posterior: str) -> None:
    rows, held = (Documents("text", small_bytes.texts(n, n)) for n in (12, 4))
    fitted = fit_documents(options(tmp_path, posterior=posterior, epochs=1), rows, held)
    scores = fitted.scores(held)
    assert np.isfinite(scores.nll).all()
    assert (scores.information >= 0).all()
    assert len(scores.nll) == sum(len(t) + 1 for t in held.rows)
