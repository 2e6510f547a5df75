"""Moving runs to other bases without their data: every arm that a claim about it needs.

    python benchmarks/transfer_study.py --data DATA --models MODELS --cache runs/transfer
    python benchmarks/transfer_table.py runs/transfer docs/results

trec and sst2: LoRA under SWAG on MiniLM to VB-LoRA and LoRA-XS on a base of fewer blocks (transfer_base.py);
fairytale_stories: LoRA on stories260K to LoRA on TinyStories-656K, whose tokenizer differs (transfer_stories.py).
One small file of the cache for each input set and student; may be killed and run again. Every arm takes the rate of
its lowest NLL on real validation rows with the first seed: more than somebody without the data can do, the same
for all arms. ``--quick`` is a minute's check that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import Tensor
from transfer_base import kept, shrink, texts, unlabelled

from kilobayes import store
from kilobayes.distil import classes
from kilobayes.distil.duplicates import duplicates
from kilobayes.distil.generators import Given
from kilobayes.distil.rows import of_examples
from kilobayes.distil.synthesis import synthesise
from kilobayes.errors import KilobayesError
from kilobayes.files import write_json
from kilobayes.metrics import accuracy, ece, nll
from kilobayes.options import Options
from kilobayes.store import read_card
from kilobayes.tasks.data import Examples, load_examples
from kilobayes.tasks.split import stratified_holdout
from kilobayes.workflows.data import first_test
from kilobayes.workflows.discriminator import read_discriminator, train_discriminator
from kilobayes.workflows.finetune import fit_examples, load
from kilobayes.workflows.transfer_inputs import JUDGING, Making, maker

ADAPTERS = {"LoRA-XS": "LoRAXS(r=16)", "VB-LoRA": "VBLoRA()"}
ARMS = ("seeds only", "random inputs", "unfiltered", "filtered", "real inputs", "oracle")
COLUMNS = {"trec": "text", "sst2": "sentence"}


class Study:
    """One data set: its rows, pool and cache."""

    def __init__(self, name: str, a: argparse.Namespace) -> None:
        self.name, self.a, self.folder = name, a, a.cache / name
        column = {"text_column": COLUMNS[name]}
        everything = load_examples(a.data / name, "train", limit=2 * a.rows, seed=0, **column)
        own, rest = stratified_holdout(everything.labels, a.rows, 0)[::-1]
        self.train, self.validation = everything.take(own), everything.take(rest)
        split = first_test([p.name.split(".")[0] for p in (a.data / name).iterdir()])
        self.test = load_examples(
            a.data / name, split, classes=everything.classes, limit=a.scored, seed=0, **column
        )
        self.pool = unlabelled(a.data, name, a.pool)
        self.small = a.cache / f"minilm-{a.blocks}"
        apart = ("data", "models", "cache", "only", "quick")
        facts = {k: v for k, v in vars(a).items() if k not in apart}
        facts |= {"pool": len(self.pool), "test": len(self.test), "classes": self.train.classes}
        if kept(self.folder / "facts.json", lambda: facts) != json.loads(json.dumps(facts)):
            raise SystemExit(f"{self.folder} is of other settings; name another --cache")
        if not (self.small / "config.json").exists():
            near = shrink(texts(a.data, a.pool // 4), self.small, a.blocks)
            print(f"{self.small.name}: mean cosine {near:.3f}", flush=True)

    def source(self, seed: int) -> Path:
        """The source run, LoRA under SWAG on MiniLM, and its discriminator."""
        folder = self.folder / "sources" / str(seed)
        if not (folder / "posterior.json").exists():
            options = Options(posterior="SWAG(rank=5)", epochs=self.a.epochs, lr=2e-3, seed=seed, samples=8)
            done = fit_examples(options, self.train, None)
            store.save(folder, done.model, done.posterior, done.state, done.card)
        if not (folder / "discriminator" / "README.md").exists():
            train_discriminator(
                folder, self.train.texts, unlabelled=[row[0] for row in self.pool], seed=seed,
                epochs=self.a.epochs,
            )  # fmt: skip
        return folder

    def inputs(self, arm: str, seed: int) -> dict[str, Any]:
        """Inputs of an arm and how they came about; the source's probabilities with them."""

        def make() -> dict[str, Any]:
            folder, n = self.source(seed), self.a.rows
            card = read_card(folder)
            judge = read_discriminator(folder / "discriminator", card)
            seeds = of_examples(load_examples(judge.folder / "seeds.jsonl", need_labels=False))
            real, about = of_examples(self.train), {}
            if arm == "seeds only":
                rows = seeds
            elif arm in ("real inputs", "oracle"):
                rows = real
            else:
                how = "given" if arm == "random inputs" else "retrieve"
                generator = maker(Making(how, seed=seed), card, seeds, self.pool, "", JUDGING)
                if how == "given":
                    order = np.random.default_rng(seed).permutation(len(generator.texts))
                    generator = Given([generator.texts[i] for i in order])
                accept = judge.accept() if arm == "filtered" else None
                try:
                    made = synthesise(generator, seeds, n=n, max_tries=len(self.pool), accept=accept)
                except KilobayesError as error:
                    return {"failed": str(error)}
                rows, about = made.rows, {"tries": made.tries, "rejected": made.rejected}
                about |= {
                    "duplicates": vars(duplicates(rows, real)),
                    "accepted": float(judge.accept()(rows).mean()),
                }
            probs = classes.targets(load(folder), rows)
            return {"rows": rows, "probs": probs.tolist(), "about": about | judge.report["held_out"]}

        return kept(self.folder / "inputs" / f"{arm.replace(' ', '-')}-{seed}.json", make)

    def options(self, adapter: str, rate: float, seed: int, epochs: int) -> Options:
        given: dict[str, Any] = {"posterior": "Point()", "calibration": "0", "max_length": 64}
        return Options(
            model=str(self.small), adapter=ADAPTERS[adapter], lr=rate, seed=seed, epochs=epochs, **given
        )

    def student(self, adapter: str, arm: str, rate: float, seed: int) -> dict[str, Any]:
        """Figures of one student on validation and test rows."""

        def make() -> dict[str, Any]:
            found, clock = self.inputs(arm, seed), time.process_time()
            if "failed" in found:
                return found
            probs = torch.tensor(found["probs"], dtype=torch.float64)
            if arm == "oracle":
                probs = torch.nn.functional.one_hot(torch.tensor(self.train.labels), probs.shape[1]).double()
            rows = [tuple(row) for row in found["rows"]]
            # as many steps for the seeds as for the others
            more = -(-self.a.rows // 16) // -(-len(rows) // 16)
            options = self.options(adapter, rate, seed, self.a.epochs * more)
            model = classes.transfer(options, rows, probs, self.train.classes)
            seconds = time.process_time() - clock
            return self.figures(model, seed) | {"seconds": seconds}

        name = f"{rate:g}-{seed}.json"
        return kept(self.folder / "students" / adapter / arm.replace(" ", "-") / name, make)

    def figures(self, model: Any, seed: int) -> dict[str, Any]:
        """Accuracy, NLL and calibration, and how often the class is the source's."""

        def said() -> list[list[float]]:
            return load(self.source(seed)).predict(self.test).probs.tolist()

        theirs = torch.tensor(kept(self.folder / "said" / f"{seed}.json", said))
        out = {"validation": _scores(model.predict(self.validation).probs, self.validation)}
        probs = model.predict(self.test).probs
        same = (probs.argmax(-1) == theirs.argmax(-1)).double().mean()
        return out | {"test": _scores(probs, self.test) | {"agreement": float(same)}}

    def work(self) -> None:
        """Sources, then every arm of every adapter."""
        for seed in range(self.a.seeds):
            kept(
                self.folder / "source" / f"{seed}.json", lambda s=seed: self.figures(load(self.source(s)), s)
            )
        rates = [float(r) for r in self.a.rates.split(",")]
        for adapter in list(ADAPTERS)[: 1 if self.a.quick else None]:
            for seed in range(self.a.seeds):  # a head that learned nothing
                self.blank(adapter, seed)
            for arm in ARMS:
                tried = {r: self.student(adapter, arm, r, 0) for r in rates}
                usable = [r for r in rates if "failed" not in tried[r]]
                if not usable:
                    print(f"{self.name}, {adapter}, {arm}: {tried[rates[0]]['failed']}", flush=True)
                    continue
                best = min(usable, key=lambda r: tried[r]["validation"]["nll"])
                every = [self.student(adapter, arm, best, s) for s in range(self.a.seeds)]
                path = self.folder / "chosen" / adapter / f"{arm.replace(' ', '-')}.json"
                write_json(path, {"arm": arm, "rate": best})
                mean = np.mean([e["test"]["accuracy"] for e in every if "test" in e])
                print(f"{self.name}, {adapter}, {arm}: rate {best:g}, accuracy {mean:.3f}", flush=True)

    def blank(self, adapter: str, seed: int) -> dict[str, Any]:
        """The target as it starts: a random head on the base."""

        def make() -> dict[str, Any]:
            soft = torch.full((2, len(self.train.classes)), 1.0 / len(self.train.classes)).double()
            options = self.options(adapter, 1e-12, seed, 1)
            return self.figures(classes.transfer(options, [("a",), ("b",)], soft, self.train.classes), seed)

        return kept(self.folder / "students" / adapter / "untrained" / f"0-{seed}.json", make)


def _scores(probs: Tensor, rows: Examples) -> dict[str, float]:
    found, labels = probs.numpy(), np.asarray(rows.labels)
    return {k: float(m(found, labels)) for k, m in (("accuracy", accuracy), ("nll", nll), ("ece", ece))}


def main(arguments: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    p.add_argument("--models", type=Path, help="folder of the language models; none leaves these out")
    p.add_argument("--cache", type=Path, default=Path("runs/transfer"))
    p.add_argument("--only", default="trec,sst2,stories", help="parts, separated by commas")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--rows", type=int, default=250, help="real rows, validation rows, and inputs made")
    p.add_argument("--pool", type=int, default=16000, help="unlabelled texts")
    p.add_argument("--blocks", type=int, default=5, help="of MiniLM's six that the target base keeps")
    p.add_argument("--scored", type=int, default=300, help="test rows")
    p.add_argument("--epochs", type=int, default=8)
    p.add_argument("--rates", default="1e-3,4e-3,1.6e-2")
    p.add_argument(
        "--documents", type=int, default=128, help="stories to train on, and texts that are written"
    )
    p.add_argument("--story-rates", default="6e-3,2e-2")
    p.add_argument("--story-epochs", type=int, default=3)
    p.add_argument("--quick", action="store_true")
    a = p.parse_args(arguments)
    if a.quick:
        a.seeds, a.rows, a.pool, a.scored, a.epochs, a.rates = 1, 40, 800, 40, 2, "4e-3"
        a.documents, a.story_rates, a.story_epochs, a.only = 16, "6e-3", 1, a.only.replace(",sst2", "")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    for name in a.only.split(","):
        if name != "stories":
            Study(name, a).work()
        elif a.models:
            from transfer_stories import Stories

            Stories(a).work()


if __name__ == "__main__":
    main()
