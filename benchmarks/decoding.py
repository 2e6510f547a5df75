"""A step of generation averaged over S posterior samples against loops over PEFT adapters.

    python benchmarks/decoding.py --quick
    python benchmarks/decoding.py --only "B=1 S=16+upper B=1 S=16"

A random Llama (d=512, 12 layers, vocabulary 32,000), LoRA r=8 on q,v or, where the setting says upper, in its
upper four layers; 64 tokens are in the cache and one is written, probabilities, entropy and mutual information
included. kilobayes is ``decode.steps``' own step. The loops are what a user of PEFT writes: S caches, and for
each sample ``set_adapter``, or ``set_peft_model_state_dict``, a forward and a softmax. Averaged probabilities
are asserted equal. Prints one JSON object; ratios are processor time over the base's own step with a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import timing
import torch
from peft import set_peft_model_state_dict
from torch import Tensor

from kilobayes import host
from kilobayes.host.cache import Members
from kilobayes.lm.decode import averaged
from kilobayes.types import Params

LENGTH = 64
REPEATS = 4  # steps of a timing
CASES = ((1, 1), (1, 4), (1, 10), (1, 16), (1, 32), (8, 4), (8, 10), (8, 32))
GOALS = {
    (1, 10): {"kilobayes": 2.0, "packed": 1.4, "bf16": 1.4},
    (1, 16): {"kilobayes": 2.35, "packed": 1.7, "bf16": 1.7},
    (1, 32): {"kilobayes": 3.2, "packed": 2.5, "bf16": 2.5},
    (8, 10): {"kilobayes": 4.3, "packed": 3.2, "bf16": 2.7},
    (8, 32): {"kilobayes": 10.2, "packed": 7.8, "bf16": 6.8},
}
UPPER = [8, 9, 10, 11]


def draws(model: Any, stack: int) -> Params:
    gen = torch.Generator().manual_seed(1)
    return {k: 0.05 * torch.randn(stack, *v.shape[1:], generator=gen) for k, v in host.read(model).items()}


def prompt(rows: int) -> dict[str, Tensor]:
    return timing.tokens(rows, LENGTH)


def one_more(rows: int) -> dict[str, Tensor]:
    """A token after the prompt."""
    ids = timing.tokens(rows, LENGTH + 1)["input_ids"]
    return {"input_ids": ids[:, -1:], "attention_mask": torch.ones_like(ids)}


def back(cache: Any) -> None:
    """The prompt alone again, so that every timed step has the same cache."""
    cache.crop(LENGTH - cache.get_seq_length())


def base_step(rows: int) -> Callable[[], Tensor]:
    """The base's own step with its cache."""
    model = timing.base("decoder")
    cache = model(**prompt(rows), use_cache=True, logits_to_keep=1).past_key_values

    def run() -> Tensor:
        for _ in range(REPEATS):
            out = model(**one_more(rows), past_key_values=cache, use_cache=True)
            probs = out.logits[:, -1].float().softmax(-1)
            back(cache)
        return probs

    return run


def our_step(
    model: Any, theta: Params, rows: int, pack: str, dtype: str, contexts: ExitStack
) -> Callable[[], Tensor]:
    with timing.packing(pack):
        contexts.enter_context(host.packed(model, getattr(torch, dtype), backward=False))
    members = Members(model, theta)
    contexts.enter_context(members.ready())
    members(prompt(rows))

    def run() -> Tensor:
        for _ in range(REPEATS):
            probs, _, _ = averaged(members(one_more(rows)))
            back(members.cache)
        return probs

    return run


def loops(theta: Params, layers: list[int] | None, rows: int) -> dict[str, Callable[[], Tensor]]:
    """PEFT's loops over samples; each returns averaged probabilities ``(B, V)``."""
    stack = len(next(iter(theta.values())))
    model = timing.peer("decoder", layers_to_transform=layers)
    (config,) = model.peft_config.values()
    names = [n for n, _ in model.named_parameters() if ".lora_" in n]
    states = []
    for s in range(stack):
        state = {}
        for name in names:
            site = name.partition("base_model.model.")[2].partition(".lora_")[0]
            leaf = "A" if ".lora_A." in name else "B"
            state[name.replace(".default", "")] = theta[f"{site}/{leaf}"][s]
        states.append(state)
    for s, state in enumerate(states):
        model.add_adapter(f"s{s}", config)
        set_peft_model_state_dict(model, state, adapter_name=f"s{s}")
    model.eval()
    caches = []
    for s in range(stack):
        model.set_adapter(f"s{s}")
        caches.append(model(**prompt(rows), use_cache=True, logits_to_keep=1).past_key_values)

    def step(choose: Callable[[int], None]) -> Tensor:
        for _ in range(REPEATS):
            total = torch.zeros(())
            for s in range(stack):
                choose(s)
                out = model(**one_more(rows), past_key_values=caches[s], use_cache=True)
                total = total + out.logits[:, -1].float().softmax(-1)
                back(caches[s])
        return total / stack

    def by_state_dict(s: int) -> None:
        set_peft_model_state_dict(model, states[s], adapter_name="default")

    def with_default() -> Tensor:
        model.set_adapter("default")
        return step(by_state_dict)

    return {"PEFT set_adapter": lambda: step(lambda s: model.set_adapter(f"s{s}")),
            "PEFT state dicts": with_default}  # fmt: skip


def case(name: str, rows: int, stack: int, rounds: int) -> dict[str, Any]:
    """All variants of one (B, S)."""
    layers = UPPER if name.startswith("upper") else None
    with torch.inference_mode(), ExitStack() as contexts:
        variants: dict[str, Callable[[], Any]] = {"base": base_step(rows)}
        theta: Params = {}
        for label, dtype, pack in timing.OURS:
            model = timing.hosted("decoder", dtype=dtype, layers_to_transform=layers)
            theta = theta or draws(model, stack)
            variants[label] = our_step(model, theta, rows, pack, dtype, contexts)
        with torch.inference_mode(False), torch.no_grad():
            peers = loops(theta, layers, rows)
        expected = peers["PEFT set_adapter"]()
        errors = {}
        for label in ("kilobayes", "packed", "bf16"):
            errors[label] = float((variants[label]() - expected).abs().max() / expected.max())
            assert errors[label] <= (1e-1 if label == "bf16" else 1e-4), f"{label} differs by {errors[label]}"
        timed = timing.interleaved(variants | peers, rounds, "base")
    for found in timed.values():
        found["ms"] = round(found["ms"] / REPEATS, 2)
    goals = {} if layers else GOALS.get((rows, stack), {})
    targets = timing.judged(timed, goals)
    return {"rows": rows, "samples": stack, "errors": errors, "variants": timed, "targets": targets}


def main(argv: list[str] | None = None) -> None:
    parser = timing.arguments(__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three rounds of two settings")
    a = parser.parse_args(argv)
    torch.set_num_threads(1)
    rounds = a.rounds or (3 if a.quick else 5)
    cases = {f"{part}B={b} S={s}": (b, s) for part in ("", "upper ") for b, s in CASES}
    quick = ["B=1 S=4", "upper B=1 S=4"]
    chosen = a.only.split("+") if a.only else quick if a.quick else list(cases)
    for name in chosen:
        if name not in cases:
            parser.error(f"no setting called {name!r}; there are {', '.join(cases)}")
    settings = {}
    for name in chosen:
        settings[name] = case(name, *cases[name], rounds)
        timing.progress(name, settings[name]["variants"])
    timing.report(settings, rounds)


if __name__ == "__main__":
    main()
