"""The part of transfer_study.py on language models: stories260K to TinyStories-656K, by text."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transfer_base import kept

from kilobayes import store
from kilobayes.distil import tokens
from kilobayes.distil.duplicates import duplicates
from kilobayes.distil.rows import of_documents
from kilobayes.distil.synthesis import synthesise
from kilobayes.errors import KilobayesError
from kilobayes.files import write_json
from kilobayes.language import LanguageModel
from kilobayes.options import Options
from kilobayes.store import read_card
from kilobayes.tasks.text import Documents, load_documents
from kilobayes.workflows.discriminator import read_discriminator, train_discriminator
from kilobayes.workflows.language import fit_documents
from kilobayes.workflows.language import load as load_language
from kilobayes.workflows.transfer_inputs import JUDGING, Making, maker

ARMS = ("seeds only", "random inputs", "unfiltered", "filtered", "real inputs", "oracle")
WORDS, LENGTH, CHARACTERS, SCORED = 24, 128, 1000, 60
SEEDS = 5


class Stories:
    """Fairy tales: a source run for each seed, and students on another base."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a, self.folder = a, a.cache / "stories"
        self.target = str(a.models / "TinyStories-656K")
        self.train = self.read("fairytale_stories", "train", a.documents)
        self.validation = self.read("fairytale_stories", "validation", SCORED)
        self.test = self.read("fairytale_stories", "test", SCORED)
        self.real = of_documents(self.train, WORDS)
        facts = {k: getattr(a, k) for k in ("seeds", "documents", "story_rates", "story_epochs")}
        facts |= {"words": WORDS, "length": LENGTH, "characters": CHARACTERS, "scored": SCORED}
        if kept(self.folder / "facts.json", lambda: facts) != facts:
            raise SystemExit(f"{self.folder} is of other settings; name another --cache")

    def read(self, name: str, split: str, limit: int) -> Documents:
        rows = load_documents(self.a.data / name, split).limited(limit, 0)
        return Documents("text", [text[:CHARACTERS] for text in rows.rows])

    def options(self, model: str, seed: int, rate: float, **more: Any) -> Options:
        given = {"posterior": "Point()", "calibration": "0", "epochs": self.a.story_epochs, "batch_size": 8}
        given |= {"max_length": LENGTH, "task": "lm", "data": "fairytale_stories", "samples": 1}
        return Options(model=model, seed=seed, lr=rate or 1e-12, **given | more)

    def source(self, seed: int) -> Path:
        """LoRA on stories260K, and its discriminator."""
        folder = self.folder / "sources" / str(seed)
        base = str(self.a.models / "stories260K")
        if not (folder / "posterior.json").exists():
            # as many epochs as any student has, at the rate that the study of language models chose
            done = fit_documents(self.options(base, seed, 2e-2), self.train, None)
            store.save(folder, done.model, done.posterior, done.state, done.card)
        if not (folder / "discriminator" / "README.md").exists():
            train_discriminator(
                folder, self.train, seeds=self.train.take(range(SEEDS)), seed=seed, epochs=2 * self.a.story_epochs,
                making=Making(words=WORDS, seed=seed),
            )  # fmt: skip
        return folder

    def inputs(self, arm: str, seed: int) -> dict[str, Any]:
        """What an arm's student reads: openings, and what the source wrote after them."""

        def make() -> dict[str, Any]:
            folder, n = self.source(seed), self.a.documents
            card = read_card(folder, "")
            judge = read_discriminator(folder / "discriminator", card)
            seeds, times = self.real[:SEEDS], 1
            rows, about = self.real, {}
            if arm == "oracle":
                return {"written": [_split(text) for text in self.train.rows], "about": {}}
            if arm == "seeds only":  # as many texts as the others have
                rows, times = seeds, max(2, n // SEEDS)
            elif arm == "random inputs":
                every = of_documents(self.read("web_and_wiki_sample", "train", 264), WORDS)
                rows = [every[i] for i in np.random.default_rng(seed).permutation(len(every))[:n]]
            elif arm != "real inputs":
                generator = maker(Making(words=WORDS, seed=seed + 100), card, seeds, [], self.target, JUDGING)
                accept = judge.accept() if arm == "filtered" else None
                try:
                    made = synthesise(generator, seeds, n=n, max_tries=40 * n, accept=accept)
                except KilobayesError as error:
                    return {"failed": str(error)}
                rows, about = made.rows, {"tries": made.tries, "rejected": made.rejected}
            about |= {"accepted": float(judge.accept()(rows).mean())} | judge.report["held_out"]
            about |= (
                {"duplicates": vars(duplicates(rows, self.real))} if arm in ("unfiltered", "filtered") else {}
            )
            teacher = LanguageModel.load(folder)
            written = tokens.write(
                teacher, rows, max_new_tokens=LENGTH, completions=times, seed=seed, batch_size=64
            )
            return {"written": written, "about": about}

        return kept(self.folder / "inputs" / f"{arm.replace(' ', '-')}-{seed}.json", make)

    def student(self, arm: str, rate: float, seed: int) -> dict[str, Any]:
        """Bits per byte of one student."""

        def make() -> dict[str, Any]:
            options = self.options(self.target, seed, rate, adapter="LoRA(r=8)")
            if arm == "untrained":
                blank = replace(options, epochs=1)
                return self.figures(tokens.transfer(blank, [("Once", " upon a time", False)]))
            found = self.inputs(arm, seed)
            if "failed" in found:
                return found
            return self.figures(tokens.transfer(options, [(g, w, c) for g, w, c in found["written"]]))

        return kept(self.folder / "students" / "LoRA" / arm.replace(" ", "-") / f"{rate:g}-{seed}.json", make)

    def figures(self, model: Any) -> dict[str, Any]:
        """Of whole texts, from their first token."""
        return {"validation": _bits(model, self.validation), "test": _bits(model, self.test)}

    def work(self) -> None:
        """The source, the target as it is, then every arm."""
        rates = [float(r) for r in self.a.story_rates.split(",")]
        for seed in range(self.a.seeds):
            kept(
                self.folder / "source" / f"{seed}.json",
                lambda s=seed: self.figures(load_language(self.source(s))),
            )
        self.student("untrained", 0.0, 0)
        for arm in ARMS:
            tried = {r: self.student(arm, r, 0) for r in rates}
            usable = [r for r in rates if "failed" not in tried[r]]
            if not usable:
                print(f"stories, {arm}: {tried[rates[0]]['failed']}", flush=True)
                continue
            best = min(usable, key=lambda r: tried[r]["validation"]["bits_per_byte"])
            every = [self.student(arm, best, s) for s in range(self.a.seeds)]
            path = self.folder / "chosen" / "LoRA" / f"{arm.replace(' ', '-')}.json"
            write_json(path, {"arm": arm, "rate": best})
            mean = np.mean([e["test"]["bits_per_byte"] for e in every if "test" in e])
            print(f"stories, {arm}: rate {best:g}, bits per byte {mean:.4f}", flush=True)


def _bits(model: Any, documents: Documents) -> dict[str, float]:
    scores = model.scores(documents)
    return {"bits_per_byte": float(scores.nll.sum() / scores.bytes.sum() / math.log(2))}


def _split(text: str) -> list[Any]:
    """A real text as an opening and the rest, which is cut where the text was."""
    words = text.split()
    return [" ".join(words[:WORDS]), " " + " ".join(words[WORDS:]), len(text) == CHARACTERS]
