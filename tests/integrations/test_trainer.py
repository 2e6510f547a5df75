"""Posteriors collected inside transformers' Trainer: numpy's moments, untouched training, runs that load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoTokenizer

import kilobayes as kb
from kilobayes import cli, host

from .. import small
from .training import NAMES, Recorder, base, flat, lora, plain, tokens, train

HOSTED = kb.KilobayesConfig(
    adapter=kb.LoRA(r=4), target_modules=["query", "value"], task_type="SEQ_CLS", seed=2
)


def posterior(run: Path, name: str) -> dict[str, np.ndarray]:
    """The saved tensors of a part of the state, without their axis of members."""
    held = load_file(run / "posterior.safetensors")
    return {k.removeprefix(f"{name}|"): v.numpy()[0] for k, v in held.items() if k.startswith(f"{name}|")}


def named_by_kilobayes(model: Any, shot: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What :func:`flat` found in a hosted stack of one, under the keys of its leaves."""
    names = {id(p): n.removeprefix("base_model.model.") for n, p in model.named_parameters()}
    part = ".modules_to_save.default."
    return {key: shot[names[id(leaf)].replace(part, "/")][0] for key, leaf in host.read(model).items()}


@pytest.mark.parametrize("hosted", [False, True])
def test_moments_are_those_of_the_weights_after_the_steps(hosted: bool, tmp_path: Path) -> None:
    """12 steps, the tail from step 7 on in three snapshots: after steps 8, 10 and 12."""
    seen = Recorder()
    callback = kb.PosteriorCallback("SWAG(rank=2, start=0.5, snapshots=3)", tmp_path / "run")
    model: Any = get_peft_model(base(), HOSTED) if hosted else plain()
    train(model, tmp_path, seen, callback)
    weights = [named_by_kilobayes(model, shot) for shot in seen.weights] if hosted else seen.weights
    average, squares = posterior(tmp_path / "run", "average"), posterior(tmp_path / "run", "squares")
    deviations = posterior(tmp_path / "run", "deviations")
    assert set(average) == set(weights[0])
    for key, found in average.items():
        shots = np.stack([weights[step - 1][key].double().numpy() for step in (8, 10, 12)])
        running = np.cumsum(shots, axis=0) / np.arange(1, 4).reshape(-1, *[1] * (shots.ndim - 1))
        np.testing.assert_allclose(found, shots.mean(axis=0), rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(squares[key], 3 * shots.var(axis=0), rtol=1e-4, atol=1e-12)
        np.testing.assert_allclose(deviations[key], (shots - running)[1:], rtol=1e-4, atol=1e-8)
        assert np.abs(squares[key]).max() > 0


@pytest.mark.parametrize("spec", ["SWAG(rank=2)", "SWA()", "Point()"])
def test_collecting_leaves_training_alone(spec: str, tmp_path: Path) -> None:
    """The same weights bit for bit, dropout and the order of rows included."""
    alone = train(plain(lora_dropout=0.1), tmp_path / "a").model
    callback = kb.PosteriorCallback(spec, tmp_path / "run", hold_rate=False)
    watched = train(plain(lora_dropout=0.1), tmp_path / "b", callback).model
    theirs = flat(watched)
    assert all(torch.equal(value, theirs[key]) for key, value in flat(alone).items())
    assert type(watched) is type(alone)
    assert list(watched.state_dict()) == list(alone.state_dict())


@pytest.mark.parametrize("anneal", [0.0, 0.25])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup"])
def test_the_rate_is_held_in_the_tail(schedule: str, anneal: float, tmp_path: Path) -> None:
    seen = Recorder()
    method = kb.SWA(start=0.5, rate_held=0.25, anneal=anneal)
    callback = kb.PosteriorCallback(method, tmp_path / "run")
    options = {"lr_scheduler_type": schedule, "warmup_steps": 2}
    train(plain(), tmp_path, callback, seen, **options)
    assert seen.rates[:6] == seen.scheduled[:6]
    ramp = [1 / 3, 2 / 3, 1, 1, 1, 1] if anneal else [1] * 6
    expected = [(1 - share) * seen.scheduled[5] + share * 0.0025 for share in ramp]
    assert seen.rates[6:] == pytest.approx(expected)
    untouched = Recorder()
    train(plain(), tmp_path / "b", untouched, **options)
    assert seen.scheduled == untouched.rates


def test_a_run_predicts_as_the_model_that_was_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A point, so that the mean is the model; layers of several ranks and scales."""
    options = {"rank_pattern": {"value": 2}, "alpha_pattern": {"value": 3}, "use_rslora": True}
    run = tmp_path / "run"
    trained = train(plain(**options), tmp_path, kb.PosteriorCallback(kb.Point(), run)).model.eval()
    texts = [row["text"] for row in small.rows(20, 9)]
    inputs = AutoTokenizer.from_pretrained(small.base())(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = trained(**inputs).logits.double().softmax(-1).numpy()
    classifier = kb.load(run)
    np.testing.assert_allclose(classifier.predict_proba(texts), expected, atol=1e-6)
    assert list(classifier.classes_) == list(NAMES.values())
    card = json.loads((run / "posterior.json").read_text())
    assert (card["base"], card["dtype"], card["seed"]) == (small.base(), "float32", 3)
    source = small.write(tmp_path / "test.jsonl", small.rows(20, 9))
    assert cli.run(["predict", str(run), "--input", str(source), "--output", str(tmp_path / "o.jsonl")]) == 0
    found = [row["probs"] for row in small.read(tmp_path / "o.jsonl")]
    np.testing.assert_allclose([[row[c] for c in NAMES.values()] for row in found], expected, atol=1e-5)
    capsys.readouterr()
    assert cli.run(["evaluate", str(run), "--data", str(source), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 20
    PeftModel.from_pretrained(base(), run)


@pytest.mark.parametrize("spec", ["SWAG(rank=3, start=0.25)", "Temperature(SWA(start=0.5, anneal=0.25))"])
def test_a_resumed_training_collects_the_same(spec: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 5}
    held = small.rows(12, 7)

    def callback(run: str) -> kb.PosteriorCallback:
        return kb.PosteriorCallback(spec, tmp_path / run, calibration=held)

    train(plain(), tmp_path / "a", callback("whole"), **options)
    again, seen = tmp_path / "a", Recorder()
    train(plain(), again, callback("resumed"), seen, resume=str(again / "checkpoint-5"), **options)
    assert len(seen.weights) == 7
    assert small.same_files(tmp_path / "whole", tmp_path / "resumed")
    assert small.same_files(tmp_path / "whole", tmp_path / "resumed", "adapter_model.safetensors")


def test_epochs_are_counted_in_optimiser_steps(tmp_path: Path) -> None:
    """20 rows in batches of 4, two to a step: 3 steps an epoch, so the tail's epochs end at 9 and 12."""
    seen = Recorder()
    method = kb.SWA(start=0.5, by_epoch=True)
    callback = kb.PosteriorCallback(method, tmp_path / "run")
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    train(plain(), tmp_path, seen, callback, rows=20, **options)
    assert load_file(tmp_path / "run" / "posterior.safetensors")["count"].tolist() == [2.0]
    for key, found in posterior(tmp_path / "run", "average").items():
        expected = (seen.weights[8][key] + seen.weights[11][key]) / 2
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-7)


def test_training_that_ends_early_keeps_what_was_collected(tmp_path: Path) -> None:
    seen = Recorder(stop=7)
    callback = kb.PosteriorCallback(kb.SWA(start=0.25, snapshots=100), tmp_path / "run")
    with pytest.warns(UserWarning, match="step 7 of 12"):
        train(plain(), tmp_path, callback, seen)
    for key, found in posterior(tmp_path / "run", "average").items():
        expected = np.mean([w[key].double().numpy() for w in seen.weights[3:7]], axis=0)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_temperature_is_fitted_on_texts_or_on_tokens(tmp_path: Path) -> None:
    found = []
    for name, held in (("texts", small.rows(30, 7)), ("tokens", tokens(30, 7))):
        callback = kb.PosteriorCallback("Temperature(SWAG(rank=2))", tmp_path / name, calibration=held)
        train(plain(), tmp_path, callback)
        found.append(load_file(tmp_path / name / "posterior.safetensors")["temperature"].item())
    assert found[0] == found[1] != 1.0


def test_adaptive_averages_look_at_rows_when_an_epoch_ends(tmp_path: Path) -> None:
    """The tail's epochs end at steps 9 and 12. What each average scores is computed here by transformers."""
    held, seen, run = small.rows(30, 7), Recorder(), tmp_path / "run"
    callback = kb.PosteriorCallback("ASWA(start=0.5)", run, calibration=held)
    trained = train(plain(), tmp_path, seen, callback).model.eval()
    saved = load_file(run / "posterior.safetensors")
    assert saved["count"].item() in (1.0, 2.0)
    shots = [seen.weights[8], seen.weights[11]]
    average = posterior(run, "average")
    options = [*shots, {k: (shots[0][k] + shots[1][k]) / 2 for k in shots[0]}]
    close = [all(np.allclose(average[k], shot[k], atol=1e-6) for k in average) for shot in options]
    assert sum(close) == 1
    names = dict(zip(flat(trained), [p for p in trained.parameters() if p.requires_grad], strict=True))
    inputs = AutoTokenizer.from_pretrained(small.base())(
        [row["text"] for row in held], padding=True, return_tensors="pt"
    )
    labels = torch.tensor([small.LABELS.index(row["label"]) for row in held])
    scores = []
    for shot in options:
        for key, parameter in names.items():
            parameter.data.copy_(shot[key])
        with torch.no_grad():
            scores.append(-float(torch.nn.functional.cross_entropy(trained(**inputs).logits, labels)))
    assert saved["score"].item() == pytest.approx(max(scores[0], scores[1], scores[2]), abs=1e-5)
    assert close.index(True) == int(np.argmax(scores))


def test_curvature_is_that_of_the_trainers_rows(tmp_path: Path) -> None:
    """A posterior fitted afterwards sees the tokens that were trained on."""
    callback = kb.PosteriorCallback("Laplace(prior='evidence', over='*/A')", tmp_path / "run")
    train(plain(), tmp_path, callback)
    held = load_file(tmp_path / "run" / "posterior.safetensors")
    assert 0 < held["precision"].item() < float("inf")
    found = kb.load(tmp_path / "run").predictive([row["text"] for row in small.rows(8, 9)])
    assert found.epistemic.max() > 0


def test_half_precision_is_averaged_in_full(tmp_path: Path) -> None:
    model = get_peft_model(base(dtype=torch.bfloat16), lora(), autocast_adapter_dtype=False)
    train(model, tmp_path, kb.PosteriorCallback("SWA()", tmp_path / "run"))
    held = load_file(tmp_path / "run" / "posterior.safetensors")
    assert {value.dtype for value in held.values()} == {torch.float32}
    assert any((v != v.bfloat16()).any() for k, v in held.items() if k.startswith("average"))
    assert kb.load(tmp_path / "run").fitted_.card.dtype == "bfloat16"


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    class Second(kb.PosteriorCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            state.is_world_process_zero = False
            super().on_train_begin(args, state, control, **kwargs)

    seen = Recorder()
    train(plain(), tmp_path, Second("SWA(rate_held=0.1)", tmp_path / "run"), seen)
    assert not (tmp_path / "run").exists()
    assert seen.rates[6:] == pytest.approx([1e-3] * 6)  # every process takes the same steps
