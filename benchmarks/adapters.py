"""A training step of every adapter, against PEFT's own LoRA, OLoRA, VeRA and VB-LoRA.

    python benchmarks/adapters.py --quick
    python benchmarks/adapters.py --only "decoder q,v"

MiniLM and a random Llama, float32, the same rows; kilobayes as ``train.fit``, PEFT as forward, backward and
``AdamW.step``. Prints one JSON object; ratios are processor time over that of our LoRA in the same round:
median, smallest and largest. Numbers trained and bytes of the compact file leave heads out; without
``--quick``, also by how many bytes a step raises resident memory at its peak.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import timing
import torch
from peft import VBLoRAConfig, VeraConfig
from training_step import SHAPES, STEPS, Fixed, ours, theirs

from kilobayes import host, parametrise, spec, tree

SETTINGS = ("encoder q,v", "encoder all linear", "decoder q,v", "decoder all linear")
OURS = {
    "LoRA": "LoRA(r=8)",
    "OLoRA": "OLoRA(r=8)",
    "VeRA": "VeRA(r=256)",
    "VB-LoRA": "VBLoRA(r=4, h=90, b=128, k=2)",
    "LoRA-XS": "LoRAXS(r=16)",
    "NOLA": "NOLA()",
    "RoseLoRA": "RoseLoRA()",
    "MoRA": "MoRA()",
    "HydraLoRA": "HydraLoRA()",
    "B-LoRA": "BLoRA()",
}
THEIRS: dict[str, dict[str, Any]] = {
    "PEFT LoRA": {},
    "PEFT OLoRA": {"init_lora_weights": "olora"},
    "PEFT VeRA": {"method": VeraConfig, "r": 256},
    "PEFT VB-LoRA": {"method": VBLoRAConfig, "r": 4, "num_vectors": 90, "vector_length": 128, "topk": 2},
}
GOALS = {"VeRA": 1.08, "VB-LoRA": 1.08}  # over our LoRA


def setting(name: str, rounds: int, brief: bool) -> dict[str, Any]:
    """One model and choice of layers."""
    kind, _, targets = name.partition(" ")
    rows, length = SHAPES[kind]
    data = Fixed(kind, rows, length)
    variants: dict[str, Callable[[], Any]] = {}
    facts: dict[str, dict[str, int]] = {}
    with ExitStack() as contexts:
        for label, options in THEIRS.items():
            model = timing.peer(kind, targets, **options)
            variants[label] = theirs(model, data)
            head = ("classifier", "score")
            trained = [
                p.numel()
                for n, p in model.named_parameters()
                if p.requires_grad and not any(h in n for h in head)
            ]
            facts[label] = {"trained": sum(trained)}
        for label, text in OURS.items():
            model = timing.hosted(kind, targets, adapter=spec.adapter(text))
            contexts.enter_context(host.packed(model))
            contexts.enter_context(host.read_token(model))
            variants[label] = ours(model, data, rows)
            heads = host.heads(model)
            leaves = {k: v for k, v in host.read(model).items() if tree.split_key(k)[0] not in heads}
            stored = parametrise.stored(host.method(model), host.sites(model), leaves)
            facts[label] = {"trained": tree.numbers(leaves), "stored_bytes": stored}
        found = timing.interleaved(variants, rounds, "LoRA")
        for label, run in variants.items():
            found[label]["ms"] = round(found[label]["ms"] / STEPS, 2)
            found[label] |= facts[label]
            if not brief:
                found[label]["extra_peak_bytes"] = timing.extra_peak(run)
    return {"rows": rows, "tokens": length, "variants": found, "targets": timing.judged(found, GOALS)}


def main(argv: list[str] | None = None) -> None:
    parser = timing.arguments(__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="MiniLM's query and value, and no memory")
    a = parser.parse_args(argv)
    torch.set_num_threads(1)
    wanted = a.only.split("+") if a.only else (SETTINGS[:1] if a.quick else SETTINGS)
    rounds = a.rounds or (3 if a.quick else 5)
    done = {}
    for name in wanted:
        done[name] = setting(name, rounds, a.quick)
        timing.progress(name, done[name]["variants"])
    timing.report(done, rounds)


if __name__ == "__main__":
    main()
