"""What a callback cannot collect is refused, before training if it can be."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from peft import VeraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

import kilobayes as kb
from kilobayes.errors import KilobayesError

from .. import small
from .training import Recorder, base, lora, plain, train


def test_resuming_needs_what_was_collected(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 5}
    train(plain(), tmp_path, **options)
    resume = str(tmp_path / "checkpoint-5")
    with pytest.raises(KilobayesError, match=r"step 5.*nothing was collected"):
        train(plain(), tmp_path, kb.PosteriorCallback("SWA()", tmp_path / "r"), resume=resume, **options)
    train(plain(), tmp_path, kb.PosteriorCallback("SWA()", tmp_path / "r"), **options)
    with pytest.raises(KilobayesError, match=r"collected for SWA"):
        train(plain(), tmp_path, kb.PosteriorCallback("SWAG()", tmp_path / "s"), resume=resume, **options)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("Ensemble(SWA(), members=2)", "takes part in training"),
        ("IVON()", "takes part in training"),
        ("Temperature(SWA())", "needs rows to calibrate on"),
    ],
)
def test_posteriors_that_a_callback_cannot_collect(spec: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(KilobayesError, match=message):
        kb.PosteriorCallback(spec, tmp_path)


def test_a_prior_is_refused_before_training(tmp_path: Path) -> None:
    seen = Recorder()
    with pytest.raises(KilobayesError, match="takes part in training"):
        train(plain(), tmp_path, kb.PosteriorCallback(kb.Point(prior_precision=1.0), tmp_path / "r"), seen)
    assert not seen.weights


def renamed(name: str) -> Any:
    model = plain()
    model.get_base_model().name_or_path = model.get_base_model().config._name_or_path = name
    return model


def poolerless() -> Any:
    """On an encoder whose files hold no pooler, so that a random one is made, which nobody would save."""
    folder = tempfile.mkdtemp(prefix="poolerless-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shutil.copytree(small.base(), folder, dirs_exist_ok=True)
    model = base().bert
    model.pooler = None
    model.save_pretrained(folder)
    return get_peft_model(AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3), lora())


def changed() -> Any:
    model = plain()
    model.get_base_model().bert.embeddings.word_embeddings.weight.data += 1.0
    return model


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (lambda: get_peft_model(base(), VeraConfig(r=4, task_type="SEQ_CLS")), {}, "only LoRA.*VERA"),
        (base, {}, "only a PeftModel"),
        (lambda: renamed(""), {}, "no name to load it by"),
        (lambda: renamed("nowhere/there"), {}, "no local directory"),
        (lambda: plain(bias="lora_only"), {}, "biases of the base"),
        (poolerless, {}, r"random.*pooler.*modules_to_save=\['pooler'\]"),
        (changed, {}, "not what its name loads"),
        (plain, {"classes": ["a", "b"]}, "has 3 classes"),
        (lambda: get_peft_model(base(num_labels=1, id2label={0: "a"}), lora()), {}, "one of several classes"),
        (lambda: get_peft_model(base(), kb.KilobayesConfig(stack=2, task_type="SEQ_CLS")), {}, "stack of 2"),
    ],
)
def test_models_that_cannot_be_watched_are_refused_before_training(
    build: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    seen = Recorder()
    with pytest.raises(KilobayesError, match=message):
        train(build(), tmp_path, kb.PosteriorCallback("SWA()", tmp_path / "run", **options), seen)
    assert not seen.weights


def test_a_run_is_not_written_over(tmp_path: Path) -> None:
    train(plain(), tmp_path, kb.PosteriorCallback("SWA()", tmp_path / "run"))
    with pytest.raises(KilobayesError, match="holds a run already"):
        train(plain(), tmp_path, kb.PosteriorCallback("SWA()", tmp_path / "run"))
