"""Small runs to serve: classifiers of two and three classes, and language models, each over one base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kilobayes import host, store
from kilobayes.models import fingerprint, load_causal
from kilobayes.random import generator
from kilobayes.tasks.data import load_examples

from .. import small

WORDS = ["once", "there", "was", "a", "girl", "boy", "dog", "and", "the", "big", "red", "sun", "sat", "ran"]
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}assistant "


def classifier(folder: Path, posterior: str, classes: int = 3, samples: int = 4, seed: int = 0) -> Path:
    """A trained run, with calibration rows."""
    from kilobayes.estimator import Classifier

    rows = [r for r in small.rows(60, 1) if small.LABELS.index(r["label"]) < classes]
    settings: dict[str, Any] = {"epochs": 1, "batch_size": 8, "lr": 0.01, "max_length": 24, "seed": seed}
    made = Classifier(small.base(), "LoRA(r=2)", posterior, samples=samples, calibration=0.4, **settings)
    made.fit([row["text"] for row in rows], [row["label"] for row in rows])
    if made.fitted_.calibration is None:
        made.fitted_ = made.fitted_.calibrated(load_examples(rows))
    made.save(folder)
    return folder


def speaking(folder: Path) -> Path:
    """A random Llama of two layers with a tokenizer of whole words and a template for conversations."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "<end>", "user", "assistant", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, num_key_value_heads=1, max_position_embeddings=64, eos_token_id=2,
        bos_token_id=None, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def language_model(folder: Path, base: Path, seed: int = 0, members: int = 3) -> Path:
    """A run whose posterior is so many random adapters."""
    from peft import get_peft_model

    from kilobayes.posteriors import Ensemble, Point

    loaded = load_causal(str(base))
    print_ = fingerprint(loaded.model)
    config = host.KilobayesConfig(
        adapter="LoRA(r=2)", target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model: Any = get_peft_model(loaded.model, config)
    model.peft_config["default"].base_model_name_or_path = str(base)
    posterior = Ensemble(Point(), members=members)
    gen = generator(seed, 1)
    theta = {k: 0.7 * torch.randn(members, *v.shape[1:], generator=gen) for k, v in host.read(model).items()}
    state = posterior.init(theta, gen)
    host.write(model, {k: v[:1] for k, v in theta.items()})
    card = store.Card(
        posterior=repr(posterior), adapter=repr(host.method(model)), base=str(base), fingerprint=print_,
        classes=[], max_length=64, samples=members, seed=seed,
        target_modules=[site.name for site in host.sites(model)], task="lm",
    )  # fmt: skip
    store.save(folder, model, posterior, state, card)
    return folder
