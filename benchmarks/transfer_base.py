"""What transfer_study.py starts from: unlabelled texts, and a smaller base to transfer to.

The base: MiniLM's first blocks, taught to embed unlabelled texts as all six do.

    python benchmarks/transfer_base.py --data DATA --out runs/minilm-5

The loss is the squared distance of the normalised mean of the last hidden states. The texts are of data sets
that no study transfers.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from kilobayes.distil.rows import Row
from kilobayes.files import write_json
from kilobayes.model_files import model_folder
from kilobayes.random import generator
from kilobayes.tasks.data import load_examples

SOURCES = {"sick": "sentence_A", "openbookqa": "question", "mrpc": "sentence1", "ag_news": "text"}

POOLS = {  # unlabelled texts: column by data set
    "trec": {"arc_easy": "question", "boolq_closed_book": "question", "fairytaleqa": "question",
             "ag_news": "text"},
    "sst2": {"ag_news": "text", "reviews_ood": "text", "fairytale_stories": "text", "tinystories": "text"},
}  # fmt: skip
WORDS = 20  # of an unlabelled text at most: the rows of both tasks are short


def unlabelled(data: Path, task: str, count: int) -> list[Row]:
    """Sentences of other data sets than the task's, as many of each."""
    out: list[Row] = []
    for name, column in POOLS[task].items():
        there = [p.name.split(".")[0] for p in (data / name).iterdir()]
        split = "train" if "train" in there else there[0]
        found = load_examples(data / name, split, text_column=column, need_labels=False).texts
        parts = [s.split() for text in found for s in re.sub(r"([?.!]) ", r"\1\n", text).split("\n")]
        usable = [(" ".join(s[:WORDS]),) for s in parts if len(s) > 2]
        order = np.random.default_rng(0).permutation(len(usable))[: count // len(POOLS[task])]
        out += [usable[i] for i in order]
    return list(dict.fromkeys(out))


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """A file's content, made if it is not there."""
    if not path.exists():
        found = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
    return json.loads(path.read_text(encoding="utf-8"))


def texts(data: Path, count: int) -> list[str]:
    """As many of every source."""
    out: list[str] = []
    for name, column in SOURCES.items():
        out += load_examples(data / name, "train", text_column=column, need_labels=False).texts[: count // 4]
    return out


def embedded(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Normalised means of hidden states ``(B, d)``."""
    mask = inputs["attention_mask"][..., None].float()
    hidden = model(**inputs).last_hidden_state
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def shrink(found: Sequence[str], out: Path, blocks: int = 5, epochs: int = 2, lr: float = 3e-4) -> float:
    """Write the smaller base; returns the mean cosine between its embeddings and MiniLM's, last epoch."""
    folder = model_folder("minilm")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    whole = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
    small = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
    small.encoder.layer = small.encoder.layer[:blocks]
    small.config.num_hidden_layers = blocks
    steps, at, cosine = epochs * (len(found) // 32), 0, 0.0
    optimiser = torch.optim.AdamW(small.parameters(), lr=lr, weight_decay=0.0)
    for epoch in range(epochs):
        cosine, order = 0.0, torch.randperm(len(found), generator=generator(0, epoch))
        for rows in order.split(32)[: len(found) // 32]:
            batch = [found[int(i)] for i in rows]
            inputs = dict(tokenizer(batch, padding=True, truncation=True, max_length=48, return_tensors="pt"))
            with torch.no_grad():
                wanted = embedded(whole, inputs)
            near = (embedded(small, inputs) * wanted).sum(-1).mean()
            optimiser.zero_grad()
            (1.0 - near).backward()
            for group in optimiser.param_groups:
                group["lr"] = lr * (1.0 - at / steps)
            optimiser.step()
            at, cosine = at + 1, cosine + float(near.detach()) / (len(found) // 32)
    small.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return cosine


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    p.add_argument("--out", type=Path, default=Path("runs/minilm-5"))
    p.add_argument("--blocks", type=int, default=5, help="kept, of six")
    p.add_argument("--texts", type=int, default=3200)
    p.add_argument("--epochs", type=int, default=2)
    a = p.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    clock = time.process_time()
    cosine = shrink(texts(a.data, a.texts), a.out, a.blocks, a.epochs)
    print(f"{a.out}: mean cosine {cosine:.3f}, {time.process_time() - clock:.0f} s")


if __name__ == "__main__":
    main()
