"""Every posterior against LoRA with a temperature: accuracy, calibration, doubt, cost; learning rates tuned.

    python benchmarks/study.py --data trec=DIR/trec --ood trec=DIR/sst2 --cache runs/study
    python benchmarks/study_table.py runs/study docs/results

The first command trains, fits and predicts whatever the cache does not hold yet, one arm at a time, and may be
killed and run again; the second makes the tables and plots of what is there. A *kind* is a posterior that is
trained; an *arm* is what is scored: a kind as it is, another posterior fitted after a kind's training, or three
members pooled. Rows for calibration are held out of training; they choose every arm's learning rate, fit
temperatures, scales and prior precisions. Test rows are scored at the chosen rate only.
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
from study_arms import ARMS, KINDS, MEMBERS, Arm, arguments
from torch import Tensor

from kilobayes import spec, train, tree
from kilobayes.checkpoint import read_tensors, write_atomically
from kilobayes.energy import ModelEnergy
from kilobayes.models import load_base
from kilobayes.options import Options
from kilobayes.posteriors import ask
from kilobayes.posteriors.temperature import best_temperature
from kilobayes.predict import Rows, class_nll
from kilobayes.random import generator
from kilobayes.tasks.classify import Classify
from kilobayes.tasks.data import available_splits, load_examples
from kilobayes.tasks.split import stratified_holdout
from kilobayes.types import Posterior, Progress
from kilobayes.workflows.attach import attach, start
from kilobayes.workflows.data import first_test
from kilobayes.workflows.learn import choosing


class Study:
    """One data set: its model, rows and cache."""

    def __init__(
        self, name: str, source: str, ood: str | None, shift: str | None, a: argparse.Namespace
    ) -> None:
        self.a, self.folder = a, a.cache / name
        everything = load_examples(source, "train", limit=a.rows + a.calibration, seed=0)
        kept, held = stratified_holdout(everything.labels, a.calibration, 0)
        examples = everything.take(kept)
        split = first_test(available_splits(source))
        test = load_examples(source, split, classes=everything.classes, limit=a.test_rows, seed=0)
        self.base = load_base("minilm", everything.classes, dtype=a.dtype)
        self.model = attach(self.base, Options(data=name, dtype=a.dtype))
        self.task = Classify(self.base.tokenizer, tuple(everything.classes), a.max_length)
        self.encoded = self.task.encode(examples)
        sets = {"calibration": everything.take(held), "test": test}
        if ood:
            outside = first_test(available_splits(ood))
            sets["ood"] = load_examples(ood, outside, need_labels=False, limit=a.ood_rows, seed=0)
        if shift:
            elsewhere = first_test(available_splits(shift))
            sets["shift"] = load_examples(
                shift, elsewhere, classes=everything.classes, limit=a.shift_rows, seed=0
            )
        self.sets = {
            k: ModelEnergy(self.model, self.task, self.task.encode(v), trained=self.encoded)
            for k, v in sets.items()
        }
        self.rates = [float(r) for r in a.rates.split(",")]
        apart = ("data", "ood", "shift", "cache", "only", "train_only", "no_scaled", "one_rate")
        facts = {
            "classes": list(everything.classes),
            "rows": {"train": len(examples)} | {k: len(v) for k, v in self.sets.items()},
            "split": split,
            "ood": Path(ood).name if ood else None,
            "shift": Path(shift).name if shift else None,
            "labels": {k: v.labels.tolist() for k, v in self.sets.items() if k != "ood"},
            "settings": {k: v for k, v in vars(a).items() if k not in apart},
        }
        path = self.folder / "facts.json"
        if path.exists() and json.loads(path.read_text()) != facts:
            raise SystemExit(f"{path} is of other settings; name another --cache")
        self.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(facts))

    def path(self, part: str, name: str, rate: float, seed: int) -> Path:
        return self.folder / part / name.replace(", ", "-").replace(" ", "-") / f"{rate:g}-{seed}.safetensors"

    def state(self, kind: str, rate: float, seed: int) -> tuple[Any, float]:
        """A trained member's state and the seconds it took."""
        tensors, about = read_tensors(self.path("states", kind, rate, seed))
        return tree.unflatten_state(spec.posterior(KINDS[kind]), tensors), float(about["seconds"])

    def train(self, kind: str, seeds: list[int], rates: list[float]) -> None:
        """Train what is not in the cache: all rates and seeds in one stack."""
        runs = [(r, s) for r in rates for s in seeds if not self.path("states", kind, r, s).exists()]
        if not runs:
            return
        posterior, clock = spec.posterior(KINDS[kind]), time.process_time()
        members = tuple(s for _, s in runs)
        settings = train.Settings(
            lr=tuple(r for r, _ in runs), epochs=self.a.epochs, seeds=members, batch_size=16
        )
        theta = start(self.model, self.base, list(members))
        rows = Rows(self.task, self.encoded)
        with choosing(self.model, self.task, class_nll(self.task)) as nll:
            done = train.fit(
                self.model, rows, nll, posterior, theta, settings, energy=self.sets["calibration"]
            )
        each = (time.process_time() - clock) / len(runs)
        for index, (rate, seed) in enumerate(runs):
            about = {"seconds": str(each), "diverged": str(index in done.diverged)}
            path = self.path("states", kind, rate, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            flat = tree.flatten_state(tree.state_member(done.state, index))
            write_atomically(path, flat, about)
        print(
            f"{self.folder.name}: {kind}, {len(runs)} members of {each:.1f} s, diverged {done.diverged}",
            flush=True,
        )

    def fitted(self, arm: Arm, rate: float, seeds: list[int], scaled: bool) -> tuple[Posterior, Any, float]:
        """An arm's posterior and state from its kind's, and the seconds of training and fitting."""
        clock = time.process_time()
        posterior, trained = spec.posterior(arm.how), spec.posterior(KINDS[arm.kind])
        found = [self.state(arm.kind, rate, seed) for seed in seeds]
        begin, state = start(self.model, self.base, seeds), tree.concatenate_states([s for s, _ in found])
        if hasattr(posterior, "base") and not arm.pooled:  # fitted around what was trained
            state = replace(posterior.init(begin, generator(seeds[0], 3)), inner=state)
        elif type(ask.innermost(posterior)) is not type(trained):  # fitted after training as a point
            state = posterior.observe(
                posterior.init(begin, generator(seeds[0], 3)),
                state.theta,
                Progress(1, 1, 1, len(self.encoded)),
            )
        elif getattr(posterior, "rank", None) == 0:  # SWAG-diagonal
            state = replace(state, deviations={k: v[:, :0] for k, v in state.deviations.items()})
        if scaled:
            posterior = spec.posterior(f"Scale({arm.how})")
            state = replace(posterior.init(begin, generator(0, 3)), inner=state)
        state = ask.fit(posterior, state, self.sets["calibration"], generator(seeds[0], 6))
        return posterior, state, sum(s for _, s in found) + time.process_time() - clock

    def score(self, name: str, arm: Arm, rate: float, replicate: int, parts: list[str], scaled: bool) -> None:
        """Class scores of the parts that the cache lacks."""
        path = self.path("scores", f"{name} scaled" if scaled else name, rate, replicate)
        kept, about = read_tensors(path) if path.exists() else ({}, {})
        if all(p in kept for p in parts):
            return
        first = replicate * MEMBERS
        seeds = list(range(first, first + MEMBERS)) if arm.pooled else [first]
        posterior, state, seconds = self.fitted(arm, rate, seeds, scaled)
        about |= {"seconds": str(seconds), "bytes": str(tree.total_bytes(tree.flatten_state(state).values()))}
        if scaled:
            about["scale"] = str(state.factor.tolist())
        for part in [p for p in parts if p not in kept]:
            clock = time.process_time()
            kept[part] = ask.predictive(
                posterior, state, self.sets[part], self.a.samples, generator(first, 7)
            )
            about[f"seconds of {part}"] = str(time.process_time() - clock)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, kept, about)

    def calibration_nll(self, name: str, rate: float, tempered: bool) -> float:
        """Mean over replicates, after a temperature if asked for."""
        labels, total = self.sets["calibration"].labels, 0.0
        for replicate in range(self.a.replicates):
            drawn = read_tensors(self.path("scores", name, rate, replicate))[0]["calibration"].double()
            drawn = drawn / best_temperature(drawn, labels) if tempered else drawn
            total += nll(drawn, labels) / self.a.replicates
        return total

    def diverged(self, arm: Arm, rate: float) -> bool:
        seeds = range(0, MEMBERS * self.a.replicates, 1 if arm.pooled else MEMBERS)
        files = [self.path("states", arm.kind, rate, seed) for seed in seeds]
        return any(read_tensors(f)[1]["diverged"] == "True" for f in files)

    def work(self, name: str, arm: Arm) -> None:
        """Everything of one arm."""
        every = range(0, MEMBERS * self.a.replicates, 1 if arm.pooled else MEMBERS)
        path = self.folder / "chosen.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        # pooled arms take the rate of their kind alone, which has a third of their members
        rates = [kept[arm.kind]["tempered"]] if arm.pooled else self.rates
        self.train(arm.kind, list(every), rates)
        if self.a.train_only:
            return
        rates = [r for r in rates if not self.diverged(arm, r)]
        for rate in rates:
            for replicate in range(self.a.replicates):
                self.score(name, arm, rate, replicate, ["calibration"], scaled=False)
        chosen = {t: min(rates, key=lambda r: self.calibration_nll(name, r, t)) for t in (False, True)}
        if self.a.one_rate:
            chosen[False] = chosen[True]
        plain = [
            part for part in self.sets if part != "shift"
        ]  # shifted rows are long, so they are scored once
        for replicate in range(self.a.replicates):
            for rate in rates if name == "LoRA" else ():  # what every arm is compared with at its own rate
                self.score(name, arm, rate, replicate, list(self.sets), scaled=False)
            self.score(name, arm, chosen[True], replicate, list(self.sets), scaled=False)
            self.score(name, arm, chosen[False], replicate, plain, scaled=False)
            if arm.scaled and not self.a.no_scaled:
                self.score(name, arm, chosen[True], replicate, plain, scaled=True)
        kept[name] = {"plain": chosen[False], "tempered": chosen[True]}
        path.write_text(json.dumps(kept, indent=1))
        print(f"{self.folder.name}: {name} done, rates {chosen}", flush=True)


def nll(drawn: Tensor, labels: Tensor) -> float:
    """Mean NLL in nats of averaged probabilities."""
    probs = drawn.double().softmax(-1).mean(0)
    return float(-probs[range(len(labels)), labels].clamp(min=1e-12).log().mean())


def main() -> None:
    a = arguments(__doc__.splitlines()[0])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    data, ood, shift = (dict(v.split("=", 1) for v in values) for values in (a.data, a.ood, a.shift))
    wanted = a.only.split(";") if a.only else list(ARMS)
    for name, source in data.items():
        study = Study(name, source, ood.get(name), shift.get(name), a)
        for arm in wanted:
            study.work(arm, ARMS[arm])


if __name__ == "__main__":
    main()
