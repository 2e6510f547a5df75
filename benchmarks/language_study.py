"""Language models under posteriors: perplexity, bits per byte and calibration, in and out of distribution.

    python benchmarks/language_study.py --data DATA --models MODELS --cache runs/language
    python benchmarks/language_table.py runs/language docs/results

The first command trains, fits and scores whatever the cache does not hold yet, one arm at a time, and may be
killed and run again; the second makes the table of what is there. DATA holds fairytale_stories (trained on, its
test split scored), tinystories (what the models were pretrained on) and web_and_wiki_sample; MODELS the folders
of the models. Every arm's learning rate is the one of lowest NLL on validation documents with the first seed.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from kilobayes import spec, train, tree
from kilobayes.checkpoint import read_tensors, write_atomically
from kilobayes.files import write_json
from kilobayes.lm.energy import LanguageEnergy
from kilobayes.lm.predict import token_scores
from kilobayes.metrics.language import summarise
from kilobayes.models import load_causal
from kilobayes.options import Options
from kilobayes.posteriors import ask
from kilobayes.random import generator
from kilobayes.tasks.lm import Language, TokenRows
from kilobayes.tasks.text import Documents, load_documents
from kilobayes.types import Progress
from kilobayes.workflows.attach import attach, start
from kilobayes.workflows.language import row_nll
from kilobayes.workflows.learn import writing

KINDS = {
    "LoRA": "Point()",
    "SWAG": "SWAG()",
    "BLoB": "BLoB()",
    "MC dropout": "MCDropout()",
}  # what is trained
ARMS = {  # what is scored: of which kind, and how it is fitted
    "LoRA": ("LoRA", "Point()"),
    "LoRA + temperature": ("LoRA", "Temperature(Point())"),
    "SWAG": ("SWAG", "SWAG()"),
    "Laplace": ("LoRA", "Laplace(linearised=False)"),
    "BLoB": ("BLoB", "BLoB()"),
    "MC dropout": ("MC dropout", "MCDropout()"),
    "SWAG + temperature": ("SWAG", "Temperature(SWAG())"),
}
SETS = {"test": ("fairytale_stories", "test"), "stories": ("tinystories", "validation"),
        "web": ("web_and_wiki_sample", "validation")}  # fmt: skip


class Study:
    """One model: its rows and cache."""

    def __init__(self, name: str, a: argparse.Namespace) -> None:
        self.a, self.folder = a, a.cache / name
        self.base = load_causal(str(a.models / name))
        self.model = attach(self.base, Options(data="fairytale_stories", task="lm"))
        self.task = Language(self.base.tokenizer, a.max_length)
        self.tokens = self.task.encode(self.read("fairytale_stories", "train", a.documents))
        self.sets = {"validation": self.task.encode(self.read("fairytale_stories", "validation", a.scored))}
        self.sets |= {k: self.task.encode(self.read(*where, a.scored)) for k, where in SETS.items()}
        held, own = self.sets["validation"], self.tokens
        self.energy = LanguageEnergy(self.model, self.task, held, trained=own, per_row=own.mean_counted)
        apart = ("data", "models", "cache", "only", "model")
        facts = {k: v for k, v in vars(a).items() if k not in apart}
        facts["tokens"] = {"train": sum(own.counted)} | {k: sum(v.counted) for k, v in self.sets.items()}
        path = self.folder / "facts.json"
        if path.exists() and json.loads(path.read_text()) != facts:
            raise SystemExit(f"{path} is of other settings; name another --cache")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, facts)

    def read(self, name: str, split: str, limit: int) -> Documents:
        rows = load_documents(self.a.data / name, split).limited(limit, 0)
        return Documents("text", [text[: self.a.characters] for text in rows.rows])

    def path(self, part: str, name: str, rate: float, seed: int) -> Path:
        return self.folder / part / name.replace(" ", "-") / f"{rate:g}-{seed}"

    def train(self, kind: str, runs: list[tuple[float, int]]) -> None:
        """Train what is not in the cache, in one stack."""
        runs = [run for run in runs if not self.path("states", kind, *run).exists()]
        if not runs:
            return
        posterior, clock, seeds = spec.posterior(KINDS[kind]), time.process_time(), [s for _, s in runs]
        settings = train.Settings(
            lr=tuple(r for r, _ in runs),
            epochs=self.a.epochs,
            seeds=tuple(seeds),
            batch_size=self.a.batch_size,
        )
        theta = start(self.model, self.base, seeds)
        with writing(self.model, lambda head: row_nll(head, self.tokens.mean_counted)) as nll:
            done = train.fit(
                self.model,
                TokenRows(self.task, self.tokens),
                nll,
                posterior,
                theta,
                settings,
                energy=self.energy,
            )
        each = (time.process_time() - clock) / len(runs)
        for index, run in enumerate(runs):
            about = {"seconds": str(each), "diverged": str(index in done.diverged)}
            path = self.path("states", kind, *run)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, tree.flatten_state(tree.state_member(done.state, index)), about)
        print(f"{self.folder.name}: {kind}, {len(runs)} members of {each:.1f} s", flush=True)

    def fitted(self, arm: str, rate: float, seed: int) -> tuple[Any, Any, float, bool]:
        """An arm's posterior and state from its kind's, the seconds of both, and whether it diverged."""
        kind, how = ARMS[arm]
        clock, posterior, trained = time.process_time(), spec.posterior(how), spec.posterior(KINDS[kind])
        tensors, about = read_tensors(self.path("states", kind, rate, seed))
        state = tree.unflatten_state(trained, tensors)
        begin = start(self.model, self.base, [seed])
        if hasattr(posterior, "base"):
            state = replace(posterior.init(begin, generator(seed, 3)), inner=state)
        elif type(posterior) is not type(trained):
            progress = Progress(1, 1, 1, len(self.tokens))
            state = posterior.observe(posterior.init(begin, generator(seed, 3)), state.theta, progress)
        state = ask.fit(posterior, state, self.energy, generator(seed, 6))
        seconds = float(about["seconds"]) + time.process_time() - clock
        return posterior, state, seconds, about["diverged"] == "True"

    def score(self, arm: str, rate: float, seed: int, parts: list[str]) -> dict[str, Any]:
        """Figures of the parts, from the cache where it holds them."""
        path = self.path("scores", arm, rate, seed)
        kept = json.loads(path.read_text()) if path.exists() else {}
        if all(part in kept for part in parts):
            return kept
        if arm == "not fine-tuned":
            posterior, seconds, lost = spec.posterior("Point()"), 0.0, False
            state = posterior.init(start(self.model, self.base, [0]), generator(0, 3))
            size = 0
        else:
            posterior, state, seconds, lost = self.fitted(arm, rate, seed)
            size = tree.total_bytes(tree.flatten_state(state).values())
        kept |= {"seconds": seconds, "bytes": size, "diverged": lost}
        count = ask.count(posterior, state, self.a.samples)
        theta = ask.draws(posterior, state, self.energy, count, generator(seed, 7))
        for part in [p for p in parts if p not in kept]:
            found = token_scores(
                self.model, theta, self.task, self.sets[part],
                transform=lambda scores: ask.transform(posterior, state, scores),
            )  # fmt: skip
            kept[part] = {k: asdict(v) for k, v in summarise(found, resamples=300).items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, kept)
        return kept

    def work(self, arm: str) -> None:
        """Everything of one arm: its rate by the first seed, then all seeds at that rate."""
        if arm == "not fine-tuned":
            self.score(arm, 0.0, 0, list(SETS))
            return
        rates = [float(r) for r in self.a.rates.split(",")]
        self.train(ARMS[arm][0], [(r, 0) for r in rates])
        found = {r: self.score(arm, r, 0, ["validation"]) for r in rates}
        usable = [r for r in rates if not found[r]["diverged"]]
        best = min(usable, key=lambda r: found[r]["validation"]["nll"]["value"])
        self.train(ARMS[arm][0], [(best, s) for s in range(self.a.seeds)])
        for seed in range(self.a.seeds):
            self.score(arm, best, seed, ["validation", *SETS])
        path = self.folder / "chosen.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        write_json(path, kept | {arm: best})
        print(f"{self.folder.name}: {arm} done, rate {best:g}", flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    p.add_argument("--models", type=Path, required=True, help="folder of the models")
    p.add_argument("--model", default="stories260K,TinyStories-656K")
    p.add_argument("--cache", type=Path, default=Path("runs/language"))
    p.add_argument("--only", help="arms to work on, separated by semicolons; all if left out")
    p.add_argument("--rates", default="2e-3,6e-3,2e-2")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--documents", type=int, default=256, help="texts to train on")
    p.add_argument("--scored", type=int, default=100, help="texts of each set that is scored")
    p.add_argument("--characters", type=int, default=1000, help="of each text, from its beginning")
    p.add_argument("--epochs", type=int, default=3)
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--max-length", type=int, default=128)
    p.add_argument("--samples", type=int, default=8)
    a = p.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    for name in a.model.split(","):
        study = Study(name, a)
        for arm in a.only.split(";") if a.only else ["not fine-tuned", *ARMS]:
            study.work(arm)


if __name__ == "__main__":
    main()
