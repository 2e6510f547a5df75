"""A tiny Llama with a tokenizer of whole words in a folder, and questions that it can learn to answer."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

COLOURS = ["red", "blue", "green", "gold"]
FILLERS = [f"w{i}" for i in range(20)]
WORDS = ["A", "B", "C", "D", "E", "yes", "no", "maybe", "Question", "Answer", "Say", ":", ".", "?"]
QUICK = ["--epochs", "3", "--batch-size", "8", "--lr", "0.02", "--adapter", "LoRA(r=4)", "--max-length", "40"]


@functools.cache
def base() -> str:
    """Folder of a random Llama of two layers, width 32."""
    folder = tempfile.mkdtemp(prefix="tiny-choice-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    listed = ["<pad>", "<s>", "</s>", "<unk>", *WORDS, *COLOURS, *FILLERS]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(listed)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(listed), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(5)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def questions(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Questions with two to four options whose colour tells the place of the right one."""
    draw = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        many = int(draw.integers(2, 5))
        right = int(draw.integers(many))
        words = [FILLERS[i] for i in draw.integers(0, 20, draw.integers(0, 4))]
        words.insert(int(draw.integers(len(words) + 1)), COLOURS[right])
        options = [FILLERS[i] for i in draw.permutation(20)[:many]]
        out.append({"question": f"{' '.join(words)} ?", "choices": options, "answer": right})
    return out


def labelled(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts whose colour tells the label: 1 for red, 0 for blue."""
    draw = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        label = int(draw.integers(2))
        words = [FILLERS[i] for i in draw.integers(0, 20, draw.integers(0, 5))]
        words.insert(int(draw.integers(len(words) + 1)), ["blue", "red"][label])
        out.append({"text": " ".join(words), "label": label})
    return out
