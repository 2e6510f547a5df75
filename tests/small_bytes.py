"""A tiny language model whose tokens are bytes, in a folder."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from typing import Any

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@functools.cache
def tokenizer(template: str | None = None, side: str = "right") -> Any:
    """A token for each byte, and ``<s>``, ``</s>``, ``<pad>``; it adds nothing of itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", *letters])}
    made = Tokenizer(models.BPE(words, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    names: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    found = PreTrainedTokenizerFast(tokenizer_object=made, padding_side=side, **names)
    found.chat_template = template
    return found


@functools.cache
def base(side: str = "right") -> str:
    """Folder of a random Llama of two layers, width 16, and the tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tempfile.mkdtemp(prefix="tiny-llama-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tokenizer(None, side).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def texts(count: int, shift: int = 0) -> list[str]:
    """Short texts that repeat a pattern, of different lengths."""
    return [("ab" if (i + shift) % 2 else "abc") * (2 + (i + shift) % 5) for i in range(count)]
