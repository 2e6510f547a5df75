"""A small language model that knows facts: a Llama trained from scratch on sentences of CounterFact.

    python benchmarks/editing_base.py DATA/counterfact/test.jsonl runs/editing/base

Each fact gives three sentences that are true: its prompt, its rephrased prompt without the unrelated sentence that
the file puts before it, and its locality prompt, with their old answers. Training ends when at least ``--recall`` of the
prompts are answered rightly by free greedy generation.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kilobayes.files import write_json
from kilobayes.metrics.editing import says
from kilobayes.models import load_causal
from kilobayes.random import generator
from kilobayes.tasks.edits import Fact, Probe, encode_pair, read_facts
from kilobayes.workflows.edit_scores import columns, greedy, stop_ids

FACTS = 240


def facts(path: Path, count: int = FACTS) -> list[Fact]:
    """The first facts of the file, their rephrased prompts without what stands before the last sentence."""
    out = []
    for fact in read_facts(path, limit=count):
        said = tuple(Probe(p.prompt.rsplit(". ", 1)[-1], p.answer) for p in fact.rephrased)
        out.append(replace(fact, rephrased=said))
    return out


def pairs_of(found: list[Fact]) -> list[tuple[str, str]]:
    """True prompts and answers: all prompts, then all rephrased ones, then those of locality."""
    own = [(f.prompt, f.truth) for f in found]
    own += [(p.prompt, f.truth) for f in found for p in f.rephrased]
    return own + [(p.prompt, p.answer) for f in found for p in f.locality]


def tokenizer_of(texts: list[str], size: int) -> Any:
    """A byte-level BPE of the sentences."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    ))  # fmt: skip
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **names)


def recall(model: Any, tokenizer: Any, pairs: list[tuple[str, str]]) -> float:
    """Share of prompts that free greedy generation answers rightly."""
    rows = [encode_pair(tokenizer, prompt, answer) for prompt, answer in pairs]
    right = 0
    with torch.inference_mode():
        for some, _ in columns([rows], 128):
            written = greedy(
                model, tokenizer, some, max(len(p.answer) for p in some), stop_ids(model, tokenizer)
            )
            right += sum(says(tokenizer.decode(ids), p.text) for ids, p in zip(written, some))
    return right / len(rows)


def make(path: Path, folder: Path, a: argparse.Namespace) -> None:
    """Train the model and write it; nothing is done where it is already."""
    if (folder / "recall.json").exists():
        return
    found = facts(path, a.facts)
    pairs = pairs_of(found)
    texts = [f"{prompt} {answer}." for prompt, answer in pairs]
    tokenizer = tokenizer_of(texts, a.vocabulary)
    rows = [[*tokenizer(text)["input_ids"], 2] for text in texts]
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=a.width, num_hidden_layers=a.layers, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=3 * a.width, max_position_embeddings=192,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(a.seed)
        model = LlamaForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=a.lr, weight_decay=0.01)
    began, size = time.monotonic(), 48
    steps = a.epochs * math.ceil(len(rows) / size)
    done, known = 0, 0.0
    for epoch in range(a.epochs):
        # rows of like length together, batches in random order
        gen = generator(a.seed, epoch)
        jitter = torch.rand(len(rows), generator=gen)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]) + 3 * float(jitter[i]))
        starts = range(0, len(rows), size)
        for at in torch.randperm(len(starts), generator=gen).tolist():
            some = [rows[i] for i in order[starts[at] : starts[at] + size]]
            wide = max(map(len, some))
            ids = torch.tensor([row + [0] * (wide - len(row)) for row in some])
            mask = torch.tensor([[1] * len(row) + [0] * (wide - len(row)) for row in some])
            for group in optimiser.param_groups:
                warm = min(1.0, (done + 1) / 50)
                group["lr"] = a.lr * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done / steps)))
            loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            done += 1
        if epoch % 5 == 4 or epoch == a.epochs - 1:
            model.eval()
            known = recall(model, tokenizer, pairs[: len(found)])
            model.train()
            print(f"epoch {epoch + 1}: loss {loss.item():.3f}, recall {known:.3f}, "
                  f"{time.monotonic() - began:.0f} s", flush=True)  # fmt: skip
            if known >= a.recall:
                break
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    base = load_causal(str(folder))
    rephrased = recall(base.model, base.tokenizer, pairs[len(found) : -len(found)])
    locality = recall(base.model, base.tokenizer, pairs[-len(found) :])
    write_json(folder / "recall.json", {
        "facts": len(found), "parameters": sum(p.numel() for p in model.parameters()), "epochs": epoch + 1,
        "prompts": known, "rephrased": rephrased, "locality": locality, "seconds": time.monotonic() - began,
    })  # fmt: skip


def flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Settings of the base."""
    parser.add_argument("--facts", type=int, default=FACTS)
    parser.add_argument("--recall", type=float, default=0.97)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--vocabulary", type=int, default=1000)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    own = flags(
        argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    )
    own.add_argument("data", type=Path)
    own.add_argument("out", type=Path)
    given = own.parse_args()
    make(given.data, given.out, given)
