"""Editing facts with adapters: RoseLoRA against LoRA, LoRA-XS and training the whole matrices.

    python benchmarks/editing.py DATA/counterfact/test.jsonl --cache runs/editing --out docs/results/editing

The base is that of ``editing_base.py``, trained here if the cache does not hold it. Of its facts the first 100 are edited,
to the new answers of CounterFact; other ones choose each arm's learning rate, for single and for sequential edits, by the
harmonic mean of free success and teacher-forced locality. Arms that the cache holds are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from editing_base import facts, flags, make
from torch import Tensor

from kilobayes import host, parametrise, tree
from kilobayes.files import write_json
from kilobayes.metrics import editing
from kilobayes.models import load_causal
from kilobayes.tasks.edits import Fact
from kilobayes.types import Params, Site, delta
from kilobayes.workflows.edit import PUBLISHED, Editing, begin, edit_in_turn, host_on, learn
from kilobayes.workflows.edit_scores import Questions, ask, record, stop_ids

FULL = "full fine-tuning"
ARMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "RoseLoRA, published": (PUBLISHED, (5e-4, 3e-3, 1e-2)),
    "RoseLoRA, no clamp": ("RoseLoRA(start=0.12, end=0.8, dropout=0.1)", (3e-3, 1e-2, 3e-2)),
    "RoseLoRA, faster": ("RoseLoRA(start=0.12, end=0.8, dropout=0.1)", (1e-2,)),  # than its best rate
    "LoRA": ("LoRA(r=8, alpha=32, dropout=0.1)", (1e-3, 3e-3, 1e-2)),
    "LoRA-XS": ("LoRAXS(r=16)", (3e-3, 1e-2, 3e-2)),
    FULL: ("LoRA(r=1)", (3e-4, 1e-3, 3e-3)),  # hosted, then replaced by Whole
}


@dataclass(frozen=True, eq=False)
class Dense:
    """An update matrix of each member, ``(S, d_out, d_in)``."""

    W: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.W.mT)


@dataclass(frozen=True)
class Whole:
    """Full fine-tuning of the adapted matrices, as an adapter: the update itself is trained."""

    def init(self, sites: list[Site], constants: Params, stack: int, gen: torch.Generator) -> Params:
        return {f"{site.name}/W": torch.zeros(stack, site.d_out, site.d_in) for site in sites}

    def build(self, params: Params, constants: Params, site: Site) -> Dense:
        return Dense(params["W"])


class Arm:
    """A method on the base, and the edits."""

    def __init__(self, name: str, base: str, a: argparse.Namespace) -> None:
        self.a, self.name = a, name
        spec, self.rates = ARMS[name]
        loaded = load_causal(base)
        self.tokenizer = loaded.tokenizer
        self.model = host_on(loaded, spec, "all-linear" if name == FULL else None, 0)
        if name == FULL:
            for layer in host.layers(self.model).values():
                layer.methods[host.active(self.model)] = Whole()
        self.stop = stop_ids(self.model, self.tokenizer)

    def questions(self, found: list[Fact]) -> list[Questions]:
        return [Questions.of(self.tokenizer, fact) for fact in found]

    def ask(self, theta: Params | None, questions: list[Questions], tokens: int = 0) -> list[Any]:
        return ask(self.model, self.tokenizer, theta, questions, self.stop, tokens)

    def scores(
        self, before: list[Any], theta: Params, questions: list[Questions], tokens: int = 0
    ) -> dict[str, Any]:
        after = self.ask(theta, questions, tokens)
        return editing.summarise([record(b, t) for b, t in zip(before, after, strict=True)])

    def tune(self, found: list[Fact], single: bool) -> tuple[float, dict[str, Any]]:
        """The rate with the best score, and the scores of all: a stack over rates (and facts)."""
        questions = self.questions(found)
        own, n = [q.own for q in questions], len(questions)
        before, start = self.ask(None, questions), begin(self.model, [7])
        count = len(self.rates)
        settings = Editing(steps=self.a.steps, seed=7)
        if single:
            lr = tuple(rate for rate in self.rates for _ in found)
            first = {k: v.expand(count * n, *v.shape[1:]) for k, v in start.items()}
            theta = learn(self.model, first, own * count, replace(settings, lr=lr)).theta
            states = [tree.member(theta, slice(i * n, (i + 1) * n)) for i in range(count)]
        else:
            first = {k: v.expand(count, *v.shape[1:]) for k, v in start.items()}
            done = edit_in_turn(
                self.model, first, [own] * count, replace(settings, lr=self.rates), keep=False
            )
            states = [tree.member(done[-1].theta, i) for i in range(count)]
        table = {}
        for rate, state in zip(self.rates, states):
            got = self.scores(before, state, questions)
            success, local = got["success_free"] or 0.0, got["locality_teacher"] or 0.0
            table[f"{rate:g}"] = {"success_free": success, "locality_teacher": local}
            table[f"{rate:g}"]["score"] = 2 * success * local / (success + local) if success + local else 0.0
        best = max(self.rates, key=lambda rate: table[f"{rate:g}"]["score"])
        return best, table

    def run(self, path: Path, edits: list[Fact], other: list[Fact]) -> None:
        """Tuned, then edited, single and in sequence, for every seed; what is done is written."""
        began, cpu = time.monotonic(), time.process_time()
        sites = host.sites(self.model)
        theta = begin(self.model, [0])
        out: dict[str, Any] = {
            "adapter": repr(host.method(self.model)),
            "numbers": tree.numbers(theta),
            "bytes": parametrise.stored(host.method(self.model), sites, theta),
        }
        questions = self.questions(edits)
        own, seeds = [q.own for q in questions], list(range(self.a.seeds))
        before = self.ask(None, questions, self.a.tokens)
        rate, out["tuning_single"] = self.tune(other, True)
        out["rate_single"], out["single"] = rate, []
        for seed in seeds:
            settings = Editing(steps=self.a.steps, lr=rate, seed=seed)
            start = {k: v.expand(len(own), *v.shape[1:]) for k, v in begin(self.model, [seed]).items()}
            edited = learn(self.model, start, own, settings)
            got = self.scores(before, edited.theta, questions, self.a.tokens)
            got |= {"steps": float(edited.steps.float().mean()), "changed": self.changed(edited.theta)}
            out["single"].append(got)
        write_json(path, out)
        print(f"{self.name}: single {time.process_time() - cpu:.0f} s of CPU", flush=True)
        rate, out["tuning_sequential"] = self.tune(other[: self.a.tuned_in_turn], False)
        out["rate_sequential"], out["sequential"] = rate, []
        questions, before = questions[: self.a.in_turn], before[: self.a.in_turn]
        own = own[: self.a.in_turn]
        draw = [torch.randperm(len(own), generator=torch.Generator().manual_seed(s)).tolist() for s in seeds]
        orders = [[own[i] for i in order] for order in draw]
        settings = Editing(steps=self.a.steps, lr=rate)
        then = torch.zeros(len(seeds), len(own), 2)

        def watch(done: int, theta: Params) -> None:
            now = [own[order[done - 1]] for order in draw]
            told = self.ask(theta, [Questions(pair, {"success": [("", pair)]}) for pair in now])
            for s in seeds:
                got = editing.achieved("success", told[s].groups["success"])
                then[s, done - 1] = torch.tensor([got["success_teacher"], got["success_free"]])

        last = edit_in_turn(self.model, begin(self.model, seeds), orders, settings, watch=watch, keep=False)[
            -1
        ]
        for s in seeds:
            theta = tree.member(last.theta, s)
            got = self.scores(before, theta, questions, self.a.tokens)
            got |= {"then_teacher": float(then[s, :, 0].mean()), "then_free": float(then[s, :, 1].mean())}
            out["sequential"].append(got | {"changed": self.changed(theta)})
        out |= {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - cpu}
        write_json(path, out)
        print(f"{self.name}: done in {out['cpu_seconds']:.0f} s of CPU", flush=True)

    @torch.no_grad()
    def changed(self, theta: Params) -> float:
        """Share of the entries of the adapted matrices that an edit changes, mean over members."""
        built, hit, every = host.build(self.model, theta), 0.0, 0
        for site in host.sites(self.model):
            update = delta(built[site.name], site.d_in)
            hit += float((update != 0).flatten(1).float().mean(dim=1).mean()) * update[0].numel()
            every += update[0].numel()
        return hit / every


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags(parser)
    parser.add_argument("data", type=Path)
    parser.add_argument("--cache", type=Path, default=Path("runs/editing"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/editing"))
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--in-turn", type=int, default=24, help="of these, the sequential ones")
    parser.add_argument("--tuned-on", type=int, default=16, help="other edits, for the rates of single ones")
    parser.add_argument("--tuned-in-turn", type=int, default=8, help="of these, for those of sequential ones")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=25, help="of the texts for fluency")
    parser.add_argument("--arms", nargs="*", default=list(ARMS))
    a = parser.parse_args()
    make(a.data, a.cache / "base", a)
    found = facts(a.data, a.facts)
    edits, other = found[: a.edits], found[a.edits : a.edits + a.tuned_on]
    held = {}
    for name in a.arms:
        path = a.cache / f"{name}.json"
        if not path.exists() or "sequential" not in json.loads(path.read_text(encoding="utf-8")):
            Arm(name, str(a.cache / "base"), a).run(path, edits, other)
        held[name] = json.loads(path.read_text(encoding="utf-8"))
    from editing_table import write

    write(a, json.loads((a.cache / "base" / "recall.json").read_text(encoding="utf-8")), held)


if __name__ == "__main__":
    main()
