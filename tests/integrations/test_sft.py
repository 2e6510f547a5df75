"""A posterior of a real language model, collected inside TRL's SFTTrainer on real stories."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

import kilobayes as kb
from kilobayes import cli, host, store
from kilobayes.errors import KilobayesError
from kilobayes.integrations import host_run
from kilobayes.random import generator

from .training import Recorder

MODELS, DATA = os.environ.get("KILOBAYES_MODELS"), os.environ.get("KILOBAYES_DATA")
MODEL = Path(MODELS or "") / "TinyStories-656K"
pytestmark = [
    pytest.mark.skipif(not MODELS, reason="KILOBAYES_MODELS names no folder of models"),
    pytest.mark.skipif(not DATA, reason="KILOBAYES_DATA names no folder of data sets"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]
HOSTED = kb.KilobayesConfig(adapter=kb.LoRA(r=4), target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
PLAIN = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def stories(count: int) -> Any:
    from datasets import Dataset

    with gzip.open(Path(DATA or "") / "tinystories" / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        return Dataset.from_list([{"text": json.loads(next(file))["text"]} for _ in range(count)])


def base() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def sft(folder: Path, peft_config: Any, *callbacks: Any) -> Any:
    """Eight steps of 4 stories, which have the same start under every callback."""
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    from transformers import AutoTokenizer

    options = trl.SFTConfig(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=8, learning_rate=5e-3, report_to=[],
        disable_tqdm=True, use_cpu=True, save_strategy="no", bf16=False, max_length=48, seed=2,
        gradient_checkpointing=False, dataloader_pin_memory=False, logging_strategy="no",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        trainer = trl.SFTTrainer(
            base(), args=options, train_dataset=stories(32), peft_config=peft_config,
            processing_class=AutoTokenizer.from_pretrained(MODEL), callbacks=list(callbacks),
        )  # fmt: skip
    trainer.train()
    return trainer


def nll(model: Any) -> float:
    """Nats a token of a story that was not trained on."""
    from transformers import AutoTokenizer

    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    ids = AutoTokenizer.from_pretrained(MODEL)(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return float(model.eval()(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize("config", [PLAIN, HOSTED], ids=["plain", "hosted"])
def test_a_language_models_posterior_is_saved_and_read_back(config: Any, tmp_path: Path) -> None:
    """Steps 5 to 8 are the tail, each a snapshot."""
    seen, run = Recorder(), tmp_path / "run"
    sft(tmp_path, config, seen, kb.PosteriorCallback("SWAG(rank=2, start=0.5)", run))
    card = store.read_card(run, "lm")
    assert (card.task, card.classes, card.max_length) == ("lm", [], 512)
    hosted, posterior, state = host_run(run, base())
    held = load_file(run / "posterior.safetensors")
    assert {key for key in held if key.startswith("average|")} == {f"average|{k}" for k in host.read(hosted)}
    for key, value in host.read(hosted).items():
        assert torch.equal(value, held[f"average|{key}"])
    if config is PLAIN:
        for key, value in posterior.mean(state).items():
            expected = np.mean([w[key].double().numpy() for w in seen.weights[4:]], axis=0)
            np.testing.assert_allclose(value[0].numpy(), expected, rtol=1e-5, atol=1e-8)
    at_mean = nll(hosted)
    draws = []
    for seed in range(3):
        kb.write(hosted, posterior.sample(state, 1, generator(seed)))
        draws.append(nll(hosted))
    assert len(set(draws)) == 3
    assert all(abs(value - at_mean) < 1.0 for value in draws)


def test_collecting_leaves_sft_alone(tmp_path: Path) -> None:
    alone, watched = Recorder(), Recorder()
    sft(tmp_path / "a", PLAIN, alone)
    callback = kb.PosteriorCallback("SWA()", tmp_path / "run", hold_rate=False)
    sft(tmp_path / "b", PLAIN, watched, callback)
    for ours, theirs in zip(alone.weights, watched.weights, strict=True):
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_what_a_language_model_does_and_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    sft(tmp_path, PLAIN, kb.PosteriorCallback("SWA()", run))
    source = tmp_path / "texts.jsonl"
    source.write_text('{"text": "Once upon a time", "label": "a"}\n')
    capsys.readouterr()
    assert cli.run(["predict", str(run), "--input", str(source)]) == 2
    told = capsys.readouterr().err
    assert "holds a language model" in told
    assert f"kilobayes generate {run}" in told
    assert cli.run(["evaluate", str(run), "--data", str(source), "--json"]) == 0
    assert '"perplexity"' in capsys.readouterr().out
    assert isinstance(kb.load(run), kb.LanguageModel)
    changed = base()
    changed.lm_head.weight.data += 1.0
    with pytest.raises(KilobayesError, match="is not the one this run was trained on"):
        host_run(run, changed)
    rows = [{"text": "a", "label": "b"}]
    with pytest.raises(KilobayesError, match="fitted on class scores"):
        sft(tmp_path, PLAIN, kb.PosteriorCallback("Temperature(SWA())", tmp_path / "t", calibration=rows))
