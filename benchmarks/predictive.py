"""Prediction averaged over S posterior samples against loops over PEFT's state dicts and over merged weights.

    python benchmarks/predictive.py --quick

kilobayes runs as ``predict.logits`` does: all samples in one forward, the base shared, only the token that is
read in the last block. The loops are what a user of PEFT writes: ``set_peft_model_state_dict`` and a forward
for each sample, ``copy_`` into the parameters, or a forward with each sample's merged weights. MiniLM, q,v,
rows of 64 tokens. Outputs are asserted equal. Prints one JSON object; ratios are processor time over one
plain forward of the base.
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
from kilobayes.types import Params

LENGTH = 64
CASES = ((1, 10), (1, 32), (8, 10), (8, 16), (32, 10))
GOALS = {
    "packed": dict(zip(CASES, (3.9, 10.6, 4.3, 6.8, 4.6))),
    "bf16": dict(zip(CASES, (3.3, 11.5, 3.9, 6.8, 3.9))),
    "upper packed": dict(zip(CASES, (2.0, 5.9, 2.5, 3.5, 3.2))),
}
UPPER = [3, 4, 5]


def peft_names(theta: Params, model: Any) -> dict[str, tuple[str, str]]:
    """PEFT's LoRA parameters as (site, leaf) of kilobayes."""
    out = {}
    for name, _ in model.named_parameters():
        if ".lora_" in name:
            site = name.partition("base_model.model.")[2].partition(".lora_")[0]
            out[name] = (site, "A" if ".lora_A." in name else "B")
    assert {f"{s}/{leaf}" for s, leaf in out.values()} == {k for k in theta if k[-2:] in ("/A", "/B")}
    return out


def samples(model: Any, stack: int) -> Params:
    """Posterior draws: sane random factors, and the head's own numbers shaken."""
    gen = torch.Generator().manual_seed(1)
    out = {}
    for key, value in host.read(model).items():
        draw = 0.05 * torch.randn(stack, *value.shape[1:], generator=gen)
        out[key] = value.detach().float() + draw if key[-2:] not in ("/A", "/B") else draw
    return out


Peers = dict[str, Callable[[], Tensor]]


def loops(model: Any, theta: Params, inputs: dict[str, Tensor], stack: int) -> Peers:
    """The peers on a PEFT model; each returns logits ``(S, B, C)``."""
    names, parameters = peft_names(theta, model), dict(model.named_parameters())
    modules = dict(model.named_modules())
    scale = next(m for n, m in modules.items() if n.endswith("layer.5.attention.self.query")).scaling[
        "default"
    ]
    head = {leaf: next(n for n in parameters if n.endswith(f"classifier.modules_to_save.default.{leaf}"))
            for leaf in ("weight", "bias")}  # fmt: skip
    dtype = next(m for n, m in modules.items() if n.endswith("query.base_layer")).weight.dtype
    short = {n: n.replace(".default", "") for n in names}
    short |= {n: n.replace(".modules_to_save.default", "") for n in head.values()}

    def values(s: int) -> dict[str, Tensor]:
        out = {n: theta[f"{site}/{leaf}"][s] for n, (site, leaf) in names.items()}
        return out | {n: theta[f"classifier/{leaf}"][s] for leaf, n in head.items()}

    states = [{short[n]: v for n, v in values(s).items()} for s in range(stack)]

    def by_state_dict() -> Tensor:
        out = []
        for state in states:
            set_peft_model_state_dict(model, state)
            out.append(model(**inputs).logits.float())
        return torch.stack(out)

    def by_copy() -> Tensor:
        out = []
        for s in range(stack):
            for name, value in values(s).items():
                parameters[name].copy_(value)
            out.append(model(**inputs).logits.float())
        return torch.stack(out)

    def merged() -> Tensor:
        out = []
        sites = sorted({site for site, _ in names.values()})
        layers = {site: modules[f"base_model.model.{site}"].base_layer for site in sites}
        plain = {site: layer.weight.detach().clone() for site, layer in layers.items()}
        for s in range(stack):
            for site, layer in layers.items():
                a, b = theta[f"{site}/A"][s], theta[f"{site}/B"][s]
                layer.weight.copy_(plain[site] + scale * (b @ a).to(dtype))
            for leaf, name in head.items():
                parameters[name].copy_(theta[f"classifier/{leaf}"][s])
            with model.disable_adapter():
                out.append(_with_head(model, inputs))
        for site, layer in layers.items():
            layer.weight.copy_(plain[site])
        return torch.stack(out)

    return {"PEFT state dicts": by_state_dict, "PEFT copy_": by_copy, "merged": merged}


def _with_head(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """A forward of the base without adapters under the trained head, which disable_adapter takes off too."""
    base = model.get_base_model()
    head = base.classifier.modules_to_save["default"]
    return head(base.bert(**inputs)[1]).float()


def case(rows: int, stack: int, rounds: int, brief: bool) -> dict[str, Any]:
    """All variants of one (B, S)."""
    inputs = timing.tokens(rows, LENGTH)
    with torch.inference_mode(), ExitStack() as contexts:
        plain = timing.base("encoder")
        variants: dict[str, Callable[[], Any]] = {"base": lambda: plain(**inputs).logits}
        wanted: dict[str, list[str]] = {"all": [], "upper": []}
        theta: dict[str, Params] = {}
        peers: dict[str, Callable[[], Tensor]] = {}
        for part, layers in (("all", None), ("upper", UPPER)):
            for name, dtype, pack in timing.OURS:
                if part == "upper" and dtype == "bfloat16":
                    continue
                model = timing.hosted("encoder", dtype=dtype, layers_to_transform=layers)
                if part not in theta:
                    theta[part] = samples(model, stack)
                label = name if part == "all" else f"{part} {name}"
                variants[label] = ours(model, theta[part], inputs, stack, pack, contexts)
                wanted[part].append(label)
            if part == "all" or not brief:
                with torch.inference_mode(False):
                    other = timing.peer("encoder", layers_to_transform=layers)
                found = loops(other, theta[part], inputs, stack)
                kept = found if part == "all" else {"PEFT state dicts": found["PEFT state dicts"]}
                peers |= {n if part == "all" else f"{part} {n}": f for n, f in kept.items()}
        errors = compare(variants, peers, wanted)
        timed = timing.interleaved(variants | peers, rounds, "base")
    goals = {name: goal[rows, stack] for name, goal in GOALS.items()}
    targets = timing.judged(timed, goals)
    return {"rows": rows, "samples": stack, "errors": errors, "variants": timed, "targets": targets}


def ours(
    model: Any, theta: Params, inputs: dict[str, Tensor], stack: int, pack: str, contexts: ExitStack
) -> Callable[[], Tensor]:
    with timing.packing(pack):
        contexts.enter_context(host.packed(model, backward=False))
    for context in (host.read_token, host.real_tokens):
        contexts.enter_context(context(model))

    def run() -> Tensor:
        host.install(model, host.build(model, theta))
        with host.outer(model, stack):
            out = model(**inputs).logits.float()
        return host.check_rows(out, stack, out.shape[0] // stack)

    return run


def compare(variants: Peers, peers: Peers, wanted: dict[str, list[str]]) -> dict[str, float]:
    """Largest difference of logits relative to the largest of the PEFT loop's, asserted to be rounding."""
    errors = {}
    for part, names in wanted.items():
        reference = peers.get("PEFT state dicts" if part == "all" else f"{part} PEFT state dicts")
        if reference is None:
            continue
        expected = reference()
        others = [n for n in peers if n.startswith("upper") == (part == "upper")]
        for name in (*names, *others):
            error = float((({**variants, **peers})[name]() - expected).abs().max() / expected.abs().max())
            assert error <= (5e-2 if name == "bf16" else 3e-6), f"{name} differs from the loop by {error}"
            errors[name] = error
    return errors


def main(argv: list[str] | None = None) -> None:
    parser = timing.arguments(__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds of the main settings")
    a = parser.parse_args(argv)
    torch.set_num_threads(1)
    rounds = a.rounds or (3 if a.quick else 7)
    cases = {f"B={b} S={s}": (b, s) for b, s in CASES}
    chosen = a.only.split("+") if a.only else list(cases)[::3] if a.quick else list(cases)
    for name in chosen:
        if name not in cases:
            parser.error(f"no setting called {name!r}; there are {', '.join(cases)}")
    settings = {}
    for name in chosen:
        settings[name] = case(*cases[name], rounds, a.quick)
        timing.progress(name, settings[name]["variants"])
    timing.report(settings, rounds)


if __name__ == "__main__":
    main()
