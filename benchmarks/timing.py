"""What the benchmarks share: models, peers, and interleaved timing by processor time.

One thread. Variants take turns, and a ratio is taken inside each round, so that what else the machine does
falls on all of them; the median of the rounds is what counts, with the smallest and the largest beside it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from kilobayes import host
from kilobayes.adapters import LoRA
from kilobayes.host.packing import worthwhile
from kilobayes.models import load_base

TARGETS = {
    "encoder": {"q,v": ["query", "value"], "all linear": r".*encoder.*\.(query|key|value|dense)"},
    "decoder": {"q,v": ["q_proj", "v_proj"], "all linear": r".*layers.*\.\w+_proj"},
}
# name, dtype of the base, KILOBAYES_PACK ("" leaves it to the library)
OURS = (("kilobayes", "float32", ""), ("packed", "float32", "1"), ("bf16", "bfloat16", ""))
TASK = {"encoder": "SEQ_CLS", "decoder": "CAUSAL_LM"}


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, help="rounds of each setting")
    parser.add_argument("--only", default="", help="settings by name, joined by +")
    return parser


def base(kind: str, dtype: str = "float32") -> Any:
    """The frozen model: MiniLM with two classes, or a random Llama of 70 million numbers."""
    if kind == "encoder":
        return load_base("minilm", ["no", "yes"], dtype=dtype).model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=32000, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
    if dtype == "bfloat16":
        model.set_attn_implementation("eager")  # as load_base does
    return model


def hosted(
    kind: str,
    targets: str = "q,v",
    dtype: str = "float32",
    stack: int = 1,
    adapter: Any = None,
    **options: Any,
) -> Any:
    """A kilobayes model, LoRA r=8 or another; with ``init_weights=False`` its update is not zero."""
    config = host.KilobayesConfig(
        adapter=adapter or LoRA(r=8),
        target_modules=TARGETS[kind][targets],
        task_type=TASK[kind],
        stack=stack,
        **options,
    )
    return get_peft_model(base(kind, dtype), config).eval()


def peer(kind: str, targets: str = "q,v", dtype: str = "float32", method: Any = None, **options: Any) -> Any:
    """PEFT's LoRA on the same layers, in evaluation mode: kilobayes runs the base without dropout too.

    Args:
        method: class of another configuration of PEFT's, with its ``options``.
    """
    known = options if method else {"r": 8, "lora_alpha": 16} | options
    config = (method or LoraConfig)(target_modules=TARGETS[kind][targets], task_type=TASK[kind], **known)
    return get_peft_model(base(kind, dtype), config).eval()


@contextmanager
def packing(choice: str) -> Iterator[None]:
    """KILOBAYES_PACK as given, unset for ""; afterwards as it was."""
    before = os.environ.pop("KILOBAYES_PACK", None)
    if choice:
        os.environ["KILOBAYES_PACK"] = choice
    try:
        yield
    finally:
        os.environ.pop("KILOBAYES_PACK", None)
        if before is not None:
            os.environ["KILOBAYES_PACK"] = before


def tokens(rows: int, length: int, seed: int = 0, vocabulary: int = 30000) -> dict[str, Tensor]:
    """Random full rows."""
    gen = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, vocabulary, (rows, length), generator=gen)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def interleaved(variants: dict[str, Callable[[], Any]], rounds: int, reference: str) -> dict[str, Any]:
    """Processor time of each variant over that of the reference in the same round.

    Returns:
        By variant: ``ratio`` (median, smallest, largest over the rounds) and ``ms`` (median).
    """
    for run in variants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for index in range(rounds):
        for name in names if index % 2 else names[::-1]:
            start = time.process_time()
            variants[name]()
            seconds[name].append(time.process_time() - start)
    out = {}
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds[reference])]
        shown = [statistics.median(ratios), min(ratios), max(ratios)]
        out[name] = {"ratio": [round(r, 4) for r in shown], "ms": round(1e3 * statistics.median(values), 2)}
    return out


def extra_peak(run: Callable[[], Any]) -> int | None:
    """Bytes by which ``run`` raises resident memory at its peak; None where Linux's counters are missing."""
    try:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        run()
        return _status("VmHWM") - before
    except (OSError, AttributeError):
        return None


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def judged(found: dict[str, Any], target: dict[str, float]) -> dict[str, Any]:
    """Each target by variant, with whether the median ratio reaches it."""
    return {
        name: {"at most": most, "found": found[name]["ratio"][0], "reached": found[name]["ratio"][0] <= most}
        for name, most in target.items()
        if name in found
    }


def progress(name: str, variants: dict[str, Any]) -> None:
    """A line for whoever waits; the JSON comes at the end, on the standard output."""
    shown = ", ".join(f"{key} {value['ratio'][0]:.3g}" for key, value in variants.items())
    print(f"{name}: {shown}", file=sys.stderr, flush=True)


def report(settings: dict[str, Any], rounds: int) -> None:
    """Prints one JSON object."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    vector = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in cpu.get("flags", "").split()]
    machine = {
        "cpu": cpu.get("model name", platform.processor()),
        "vendor": cpu.get("vendor_id", ""),
        "instructions": vector,
        "MKL_ENABLE_INSTRUCTIONS": os.environ.get("MKL_ENABLE_INSTRUCTIONS", ""),
        "packing_pays": worthwhile(),
        "threads": torch.get_num_threads(),
    }
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "kilobayes")}
    out = {"machine": machine, "versions": versions, "rounds": rounds, "settings": settings}
    print(json.dumps(out, indent=2))
