"""Editing facts with adapters: RoseLoRA against LoRA, LoRA-XS, VB-LoRA and training the whole matrices.

``docs/results/editing.md`` and ``.json`` are made by one command, on one thread, from an empty cache:

    OMP_NUM_THREADS=1 python benchmarks/editing.py DATA/counterfact/test.jsonl --cache runs/editing --out docs/results/editing

Everything else is at its default; flags that are not are in the page's command. It can be stopped and started again: the
cache keeps what is done, and does again what was done with other settings. Arms can be run apart, by ``--arms``, into one
cache; the command without it then writes the page.

The base is that of ``editing_base.py``, trained here if the cache does not hold it. Of its facts the first 100 are edited,
to the new answers of CounterFact; other ones choose each arm's learning rate, for single and for sequential edits, by the
harmonic mean of free success and teacher-forced locality. A sequence is scored after 24 edits and after 100, of those made
so far; what "right after its edit" says is of all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from editing_base import facts, flags, make
from editing_whole import Whole

from kilobayes import host, parametrise, tree
from kilobayes.files import write_json
from kilobayes.metrics import editing
from kilobayes.models import load_causal
from kilobayes.tasks.edits import Fact
from kilobayes.types import Params, delta
from kilobayes.workflows.edit import PUBLISHED, Editing, begin, edit_in_turn, host_on, learn
from kilobayes.workflows.edit_scores import Questions, ask, record, stop_ids

FULL = "full fine-tuning"
ARMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "RoseLoRA, published": (PUBLISHED, (5e-4, 3e-3, 1e-2)),
    "RoseLoRA, no clamp": ("RoseLoRA(start=0.12, end=0.8, dropout=0.1)", (3e-3, 1e-2, 3e-2)),
    "RoseLoRA, faster": ("RoseLoRA(start=0.12, end=0.8, dropout=0.1)", (1e-2,)),  # than its best rate
    "LoRA": ("LoRA(r=8, alpha=32, dropout=0.1)", (1e-3, 3e-3, 1e-2)),
    "LoRA-XS": ("LoRAXS(r=16)", (3e-3, 1e-2, 3e-2)),
    "VB-LoRA": ("VBLoRA(r=4, h=64)", (3e-3, 1e-2, 3e-2)),
    FULL: ("LoRA(r=1)", (1e-4, 3e-4, 1e-3)),  # hosted, then replaced by Whole
}
IN_TURN = ["RoseLoRA, no clamp", "LoRA", "LoRA-XS", "VB-LoRA", FULL]  # the arms of sequences
QUICK = {
    "facts": 24, "recall": 0.0, "epochs": 2, "width": 32, "edits": 4, "in_turn": [2, 3], "tuned_on": 2,
    "tuned_in_turn": 2, "steps": 2, "seeds": 1, "tokens": 4, "arms": ["LoRA", "VB-LoRA"],
}  # fmt: skip


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
        """Tuned, then edited, single and in sequence, for every seed; what is done is written, and not done again."""
        out = cached(path, self.a)
        questions = self.questions(edits)
        if "single" not in out:
            out |= self.single(questions, other)
            write_json(path, out)
            print(f"{self.name}: single {out['cpu_single']:.0f} s of CPU", flush=True)
        if self.name in self.a.sequential and "sequential" not in out:
            out |= self.sequential(questions[: max(self.a.in_turn)], other[: self.a.tuned_in_turn])
            write_json(path, out)
            print(f"{self.name}: in sequence {out['cpu_sequential']:.0f} s of CPU", flush=True)

    def single(self, questions: list[Questions], other: list[Fact]) -> dict[str, Any]:
        """Each fact edited from the unedited model."""
        cpu, sites, theta = time.process_time(), host.sites(self.model), begin(self.model, [0])
        out: dict[str, Any] = {
            "settings": settings_of(self.a),
            "adapter": repr(host.method(self.model)),
            "numbers": tree.numbers(theta),
            "bytes": parametrise.stored(host.method(self.model), sites, theta),
        }
        own, before = [q.own for q in questions], self.ask(None, questions, self.a.tokens)
        rate, out["tuning_single"] = self.tune(other, True)
        out["rate_single"], out["single"] = rate, []
        for seed in range(self.a.seeds):
            settings = Editing(steps=self.a.steps, lr=rate, seed=seed)
            start = {k: v.expand(len(own), *v.shape[1:]) for k, v in begin(self.model, [seed]).items()}
            edited = learn(self.model, start, own, settings)
            got = self.scores(before, edited.theta, questions, self.a.tokens)
            got |= {"steps": float(edited.steps.float().mean()), "changed": self.changed(edited.theta)}
            out["single"].append(got)
        return out | {"cpu_single": time.process_time() - cpu}

    def sequential(self, questions: list[Questions], other: list[Fact]) -> dict[str, Any]:
        """The facts edited one after the other, each seed in an order of its own; scored after so many."""
        cpu, seeds = time.process_time(), list(range(self.a.seeds))
        rate, table = self.tune(other, False)
        own, before = [q.own for q in questions], self.ask(None, questions, self.a.tokens)
        draw = [torch.randperm(len(own), generator=torch.Generator().manual_seed(s)).tolist() for s in seeds]
        then = torch.zeros(len(seeds), len(own), 2)
        found: dict[str, list[dict[str, Any]]] = {str(count): [] for count in self.a.in_turn}

        def watch(done: int, theta: Params) -> None:
            now = [own[order[done - 1]] for order in draw]
            told = self.ask(theta, [Questions(pair, {"success": [("", pair)]}) for pair in now])
            for s in seeds:
                got = editing.achieved("success", told[s].groups["success"])
                then[s, done - 1] = torch.tensor([got["success_teacher"], got["success_free"]])
                if done in self.a.in_turn:
                    made, state = sorted(draw[s][:done]), tree.member(theta, s)
                    some = [before[i] for i in made]
                    got = self.scores(some, state, [questions[i] for i in made], self.a.tokens)
                    kept = then[s, :done].mean(dim=0).tolist()
                    got |= {"then_teacher": kept[0], "then_free": kept[1], "changed": self.changed(state)}
                    found[str(done)].append(got)

        orders = [[own[i] for i in order] for order in draw]
        settings = Editing(steps=self.a.steps, lr=rate)
        edit_in_turn(self.model, begin(self.model, seeds), orders, settings, watch=watch, keep=False)
        out: dict[str, Any] = {"tuning_sequential": table, "rate_sequential": rate, "sequential": found}
        return out | {"cpu_sequential": time.process_time() - cpu}

    @torch.no_grad()
    def changed(self, theta: Params) -> float:
        """Share of the entries of the adapted matrices that an edit changes, mean over members."""
        built, hit, every = host.build(self.model, theta), 0.0, 0
        for site in host.sites(self.model):
            update = delta(built[site.name], site.d_in)
            hit += float((update != 0).flatten(1).float().mean(dim=1).mean()) * update[0].numel()
            every += update[0].numel()
        return hit / every


def settings_of(a: argparse.Namespace) -> dict[str, Any]:
    """Everything that an arm's figures depend on."""
    apart = ("data", "cache", "out", "arms", "sequential", "quick")
    return {key: value for key, value in vars(a).items() if key not in apart}


def cached(path: Path, a: argparse.Namespace) -> dict[str, Any]:
    """What was done of an arm with these settings; nothing where they were others."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return dict(found) if found.get("settings") == settings_of(a) else {}


def parser() -> argparse.ArgumentParser:
    """The flags; a default is what the results are made with."""
    out = flags(
        argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    )
    there = Path(os.environ.get("KILOBAYES_DATA", "DATA")) / "counterfact" / "test.jsonl"
    out.add_argument("data", type=Path, nargs="?", default=there)
    out.add_argument("--cache", type=Path, default=Path("runs/editing"))
    out.add_argument("--out", type=Path, default=Path("docs/results/editing"))
    out.add_argument("--edits", type=int, default=100)
    out.add_argument(
        "--in-turn", type=int, nargs="+", default=[24, 100], help="scored after so many edits in sequence"
    )
    out.add_argument("--tuned-on", type=int, default=16, help="other edits, for the rates of single ones")
    out.add_argument("--tuned-in-turn", type=int, default=8, help="of these, for those of sequential ones")
    out.add_argument("--steps", type=int, default=25)
    out.add_argument("--seeds", type=int, default=3)
    out.add_argument("--tokens", type=int, default=25, help="of the texts for fluency")
    out.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    out.add_argument("--sequential", nargs="*", choices=list(ARMS), default=IN_TURN, metavar="ARM")
    out.add_argument("--quick", action="store_true", help="a few edits of two arms, to see that it runs")
    return out


def main(words: list[str] | None = None) -> None:
    known = parser()
    a = known.parse_args(words)
    if a.quick:
        apart = {"cache": a.cache / "quick", "out": a.cache / "quick" / "editing"}
        a = argparse.Namespace(**vars(a) | QUICK | apart)
        if not a.data.exists():
            print(f"there is no {a.data}: KILOBAYES_DATA names the folder of the data")
            return
    if max(a.in_turn) > a.edits:
        known.error("--in-turn: a sequence has at most --edits edits")
    make(a.data, a.cache / "base", a)
    found = facts(a.data, a.facts)
    edits, other = found[: a.edits], found[a.edits : a.edits + a.tuned_on]
    held = {}
    for name in a.arms:
        path = a.cache / f"{name}.json"
        Arm(name, str(a.cache / "base"), a).run(path, edits, other)
        held[name] = json.loads(path.read_text(encoding="utf-8"))
    from editing_table import write

    changed = {k: v for k, v in vars(a).items() if v != known.get_default(k)}
    write(a, changed, json.loads((a.cache / "base" / "recall.json").read_text(encoding="utf-8")), held)


if __name__ == "__main__":
    main()
