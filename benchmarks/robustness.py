"""How much accuracy and NLL depend on the learning rate and the batch size: LoRA, SWAG, BLoB, MonteCLoRA.

    python benchmarks/robustness.py --quick
    python benchmarks/robustness.py --data trec=DIR/trec --data sst2=DIR/sst2 --cache runs/robustness

A *cell* is an arm at one batch size: all learning rates and seeds of it are one stack. Each cell is a file under
``--cache``, so a run may be killed and started again. A member that diverged is scored where it was frozen, or as
even odds where all of its stack did. Nothing is selected: the spread over the grid is the result. Writes
robustness.json, robustness.md and a plot for each data set into ``--out``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from robustness_table import picture, summary, table
from torch import Tensor

from kilobayes import spec, train
from kilobayes.energy import ModelEnergy
from kilobayes.errors import KilobayesError
from kilobayes.files import write_text_atomically
from kilobayes.models import load_base
from kilobayes.options import Options
from kilobayes.posteriors import ask
from kilobayes.posteriors.temperature import best_temperature
from kilobayes.predict import Rows, class_nll
from kilobayes.random import generator
from kilobayes.tasks.classify import Classify
from kilobayes.tasks.data import Examples, available_splits, load_examples
from kilobayes.tasks.docstrings import docstring_corpus
from kilobayes.tasks.split import stratified_holdout
from kilobayes.tree import state_member
from kilobayes.workflows.attach import attach, start
from kilobayes.workflows.data import first_test
from kilobayes.workflows.evaluate import versions
from kilobayes.workflows.learn import choosing

ARMS = "LoRA=Point();SWAG=SWAG(rank=10);BLoB=BLoB();MonteCLoRA=MonteCLoRA()"
QUICK = {"rates": "1e-3,5e-3", "batches": "8,16", "seeds": 1, "rows": 32, "calibration": 16, "test_rows": 24,
         "epochs": 2, "samples": 2, "out": Path("runs/robustness-quick"), "cache": Path("runs/robustness-quick")}  # fmt: skip


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", action="append", default=[], help="NAME=FOLDER, repeated")
    p.add_argument("--arms", default=ARMS, help="NAME=POSTERIOR, separated by semicolons")
    p.add_argument("--rates", default="2e-4,5e-4,1e-3,2e-3,5e-3,1e-2")
    p.add_argument("--batches", default="8,16,32")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--rows", type=int, default=300)
    p.add_argument("--calibration", type=int, default=100, help="rows that temperatures are fitted on")
    p.add_argument("--test-rows", type=int, default=400)
    p.add_argument("--max-length", type=int, default=64)
    p.add_argument("--epochs", type=int, default=8)
    p.add_argument("--samples", type=int, default=10)
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--cache", type=Path, default=Path("runs/robustness"))
    p.add_argument("--out", type=Path, default=Path("docs/results"))
    p.add_argument(
        "--quick", action="store_true", help="a small grid on docstrings, into runs/robustness-quick"
    )
    a = p.parse_args(given)
    if a.quick:
        usual = {key: p.get_default(key) for key in QUICK}
        for key, value in QUICK.items():
            setattr(a, key, value if getattr(a, key) == usual[key] else getattr(a, key))
    elif not a.data:
        p.error("name the data, as in --data trec=DIR/trec, or take --quick")
    a.rates, a.batches = ([float(v) for v in a.rates.split(",")], [int(v) for v in a.batches.split(",")])
    a.arms = dict(v.split("=", 1) for v in a.arms.split(";"))
    return a


def sets(source: str | None, a: argparse.Namespace) -> tuple[Examples, Examples, Examples]:
    """Rows to train on, for temperatures, and to test on."""
    if source is None:
        corpus = docstring_corpus(0, a.rows, a.calibration, a.test_rows, 8)
        return corpus.train, corpus.calibration, corpus.test
    everything = load_examples(source, "train", limit=a.rows + a.calibration, seed=0)
    kept, held = stratified_holdout(everything.labels, a.calibration, 0)
    split = first_test(available_splits(source))
    test = load_examples(source, split, classes=everything.classes, limit=a.test_rows, seed=0)
    return everything.take(kept), everything.take(held), test


class Grid:
    """One data set: its model and rows, and its cells in the cache."""

    def __init__(self, name: str, source: str | None, a: argparse.Namespace) -> None:
        self.name, self.a = name, a
        examples, calibration, test = sets(source, a)
        self.base = load_base("minilm", examples.classes, dtype=a.dtype)
        self.model = attach(self.base, Options(data=name, dtype=a.dtype))
        self.task = Classify(self.base.tokenizer, tuple(examples.classes), a.max_length)
        self.encoded = self.task.encode(examples)
        self.parts = [
            ModelEnergy(self.model, self.task, self.task.encode(part), trained=self.encoded)
            for part in (calibration, test)
        ]
        self.counts = {"train": len(examples), "calibration": len(calibration), "test": len(test)}

    def cell(self, arm: str, batch: int) -> dict[str, Any]:
        """Scores of every rate and seed, from the cache or by training them."""
        a = self.a
        about = {
            key: getattr(a, key) for key in ("rates", "seeds", "epochs", "samples", "dtype", "max_length")
        }
        about |= {"data": self.name, "posterior": a.arms[arm], "batch": batch, "rows": self.counts}
        path = a.cache / f"{self.name}-{arm}-{batch}.json"
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text())
            if found["about"] != about:
                raise SystemExit(f"{path} is of other settings; name another --cache")
            return found
        clock = time.process_time()
        runs = self.runs(spec.posterior(a.arms[arm]), batch)
        found = {"about": about, "seconds": time.process_time() - clock, "runs": runs}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, json.dumps(found, indent=1) + "\n")
        print(f"{self.name}: {arm}, batches of {batch}, {found['seconds']:.0f} s, "
              f"{sum(r['diverged'] for r in runs)} of {len(runs)} diverged", flush=True)  # fmt: skip
        return found

    def runs(self, posterior: Any, batch: int) -> list[dict[str, Any]]:
        """One stack, trained and scored."""
        members = [(rate, seed) for rate in self.a.rates for seed in range(self.a.seeds)]
        settings = train.Settings(
            lr=tuple(rate for rate, _ in members),
            seeds=tuple(seed for _, seed in members),
            epochs=self.a.epochs,
            batch_size=batch,
        )
        theta, rows = start(self.model, self.base, list(settings.seeds)), Rows(self.task, self.encoded)
        out = [{"rate": rate, "seed": seed, "diverged": True} for rate, seed in members]
        even = math.log(len(self.task.classes))
        try:
            with choosing(self.model, self.task, class_nll(self.task)) as nll:
                done = train.fit(self.model, rows, nll, posterior, theta, settings)
        except KilobayesError:  # all of them diverged
            chance = {"accuracy": 1 / len(self.task.classes), "nll": even, "nll_t": even, "temperature": 1.0}
            return [run | chance for run in out]
        for index, run in enumerate(out):
            run["diverged"] = index in done.diverged
            state = state_member(done.state, index)
            held, test = (
                ask.predictive(
                    posterior, state, part, self.a.samples, generator(int(run["seed"]), 7)
                ).double()
                for part in self.parts
            )
            t = best_temperature(held, self.parts[0].labels)
            nll, accuracy = scored(test, self.parts[1].labels)
            run |= {"accuracy": accuracy, "nll": nll, "temperature": t}
            run["nll_t"] = scored(test / t, self.parts[1].labels)[0]
        return out


def scored(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """NLL in nats and accuracy of averaged probabilities, from draws ``(S, N, C)``."""
    probs = logits.softmax(-1).mean(0)
    nll = -probs[range(len(labels)), labels].clamp(min=1e-12).log().mean()
    return float(nll), float((probs.argmax(-1) == labels).double().mean())


def main(given: list[str] | None = None) -> None:
    a = arguments(given)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sources: dict[str, str | None] = dict(v.split("=", 1) for v in a.data) if a.data else {"docstrings": None}
    a.out.mkdir(parents=True, exist_ok=True)
    # folders of this machine are shortened to their last name
    words = sys.argv[1:] if given is None else given
    short = [f"{w.partition('=')[0]}=DIR/{Path(w).name}" if "=" in w and "/" in w else w for w in words]
    command = shlex.join(["python", "benchmarks/robustness.py", *short])
    file = a.out / "robustness.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for name, source in sources.items():
        grid = Grid(name, source, a)
        cells = [grid.cell(arm, batch) | {"arm": arm} for arm in a.arms for batch in a.batches]
        runs = [run | {"arm": c["arm"], "batch": c["about"]["batch"]} for c in cells for run in c["runs"]]
        settings = {
            k: getattr(a, k) for k in ("arms", "rates", "batches", "seeds", "epochs", "samples", "dtype")
        }
        results[name] = {
            "command": command, "versions": versions(), "settings": settings, "rows": grid.counts,
            "seconds": sum(c["seconds"] for c in cells), "arms": summary(runs), "runs": runs,
        }  # fmt: skip
        write_text_atomically(file, json.dumps(results, indent=1) + "\n")
        write_text_atomically(a.out / "robustness.md", table(results))
        picture(name, results[name], a.out / f"robustness-{name}.svg")
    print(table({name: results[name] for name in sources}))


if __name__ == "__main__":
    main()
