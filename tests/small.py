"""A tiny BERT with a tokenizer in a folder, and rows that it can learn."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

WORDS = ["red", "blue", "green", *(f"w{i}" for i in range(40))]
LABELS = ["warm", "cold", "fresh"]
QUICK = ["--epochs", "2", "--batch-size", "8", "--lr", "0.01", "--adapter", "LoRA(r=2)", "--max-length", "24"]


@functools.cache
def base() -> str:
    """Folder of a random BERT of two layers, width 16, and a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    folder = tempfile.mkdtemp(prefix="tiny-bert-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def rows(count: int, seed: int = 0, pairs: bool = False) -> list[dict[str, Any]]:
    """Texts of 1 to 8 words whose colour tells the label; lengths are in no order."""
    draw = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        label = int(draw.integers(3))
        words = [WORDS[i] for i in draw.integers(3, len(WORDS), draw.integers(0, 8))]
        words.insert(int(draw.integers(len(words) + 1)), WORDS[label])
        first = (
            {"premise": " ".join(words), "hypothesis": WORDS[label]} if pairs else {"text": " ".join(words)}
        )
        out.append(first | {"label": LABELS[label]})
    return out


def write(path: Path, found: list[dict[str, Any]]) -> Path:
    """Rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path


def data(folder: Path, pairs: bool = False) -> Path:
    """A folder with 60 training and 30 test rows."""
    write(folder / "train.jsonl", rows(60, 1, pairs))
    write(folder / "test.jsonl", rows(30, 2, pairs))
    return folder


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def same_files(one: Path, other: Path, name: str = "posterior.safetensors") -> bool:
    return (one / name).read_bytes() == (other / name).read_bytes()
