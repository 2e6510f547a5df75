"""A tiny causal model with a tokenizer on disk, and a run of it whose posterior was made, not trained."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kilobayes import host, spec, store
from kilobayes.models import fingerprint, load_causal
from kilobayes.types import Progress

WORDS = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u")]
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}ba"
TEMPERATURE = 1.7


def _folder() -> Path:
    folder = tempfile.mkdtemp(prefix="tiny-llama-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def base() -> Path:
    """A Llama of 64 words and 48 positions, with a template for conversations."""
    folder = _folder()
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=48, initializer_range=0.25,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(4)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@functools.cache
def run(posterior: str = "Temperature(SWAG(rank=3, start=0.0))", task: str = "lm") -> Path:
    """A run on :func:`base`: SWAG over random weights, under a temperature that is not 1."""
    folder = _folder()
    loaded = load_causal(str(base()))
    card: dict[str, Any] = {"base": str(base()), "fingerprint": fingerprint(loaded.model)}
    config = host.KilobayesConfig(
        adapter="LoRA(r=2)", target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(loaded.model, config)
    gen = torch.Generator().manual_seed(6)
    made = spec.posterior(posterior)
    leaves = host.read(model)
    state = made.init({k: torch.zeros_like(v) for k, v in leaves.items()}, gen)
    for step in range(1, 9):
        theta = {k: 0.4 * torch.randn(v.shape, generator=gen) for k, v in leaves.items()}
        state = made.observe(state, theta, Progress(step, 8, 1, 8))
    if hasattr(state, "temperature"):
        state = dataclasses.replace(state, temperature=torch.tensor([TEMPERATURE]))
    card |= {"posterior": repr(made), "adapter": repr(host.method(model)), "max_length": 48, "samples": 4}
    card |= {"target_modules": [site.name for site in host.sites(model)], "seed": 0, "task": task}
    store.save(folder, model, made, state, store.Card(classes=["a", "b"] if task != "lm" else [], **card))
    return folder
