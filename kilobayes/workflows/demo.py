"""The demonstration: a real encoder on real text, a plain LoRA and three posteriors, side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kilobayes import store
from kilobayes.energy import ModelEnergy
from kilobayes.metrics import Evaluation, Interval
from kilobayes.options import Options
from kilobayes.posteriors import Temperature
from kilobayes.posteriors.temperature import TemperatureState
from kilobayes.random import generator
from kilobayes.run_yaml import write_yaml
from kilobayes.tasks.data import Examples
from kilobayes.tasks.docstrings import DemoCorpus, docstring_corpus
from kilobayes.workflows import evaluate as work
from kilobayes.workflows.finetune import Fitted, fit_examples

ARMS = {
    "LoRA": "Point()",
    "LoRA + temperature": "",  # the same weights as the first arm's
    "LoRA + SWAG": "Temperature(SWAG(rank=10))",
    "LoRA + MultiSWAG": "Temperature(Ensemble(SWAG(rank=10), members=3))",
}
Bar = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True, eq=False)
class Told:
    """A sentence that a person would hear the model say."""

    kind: str
    text: str
    said: str


def corpus(seed: int, quick: bool) -> DemoCorpus:
    """Sentences to route to their topic; a third of them when ``quick``."""
    shrink = 3 if quick else 1
    return docstring_corpus(seed, 300 // shrink, 200 // shrink, 500 // shrink, 200 // shrink)


def arms(data: DemoCorpus, out: Path, seed: int, quick: bool, bar: Bar) -> Iterator[tuple[str, Fitted]]:
    """Each arm, trained, saved under ``out`` and ready to predict."""
    first: Fitted | None = None
    # The upper half of the encoder alone is adapted: half the bytes, and prediction shares the lower half.
    common = Options(data="docstrings", layers="3,4,5", lr=5e-3, epochs=4 if quick else 8, seed=seed)
    for name, posterior in ARMS.items():
        folder = out / name.lower().replace(" + ", "-").replace(" ", "-")
        if posterior:
            options = replace(common, posterior=posterior, out=str(folder))
            with bar(name) as watch:
                fitted = fit_examples(options, data.train, data.calibration, watch=watch)
            first = first or fitted
        else:
            assert first is not None
            fitted = with_temperature(first, data.calibration)
            options = replace(common, posterior=fitted.card.posterior, out=str(folder))
        sizes = store.save(folder, fitted.model, fitted.posterior, fitted.state, fitted.card)
        write_yaml(folder / "run.yaml", options)
        stored = float(sizes["checkpoint"] + sizes["posterior"])
        yield name, replace(fitted, cost=fitted.cost | {"stored_bytes": stored})


def with_temperature(fitted: Fitted, calibration: Examples) -> Fitted:
    """The same weights, their scores divided by a temperature fitted on the calibration rows."""
    posterior = Temperature(fitted.posterior)
    members = next(iter(fitted.posterior.mean(fitted.state).values())).shape[0]
    state = TemperatureState(fitted.state, torch.ones(members))
    energy = ModelEnergy(fitted.model, fitted.task, fitted.task.encode(calibration))
    state = posterior.fit(state, energy, generator(fitted.card.seed, 6))
    card = dataclasses.replace(fitted.card, posterior=repr(posterior))
    return replace(fitted, posterior=posterior, state=state, card=card)


def told(evaluation: Evaluation) -> list[Told]:
    """Three sentences: one the model is sure of, one it is torn about, one of a kind it never saw."""
    probs = evaluation.probs
    best = probs.max(axis=1)
    right = probs.argmax(axis=1) == evaluation.labels
    order = probs.argsort(axis=1)
    gap = best - probs[range(len(probs)), order[:, -2]]
    out = []

    def name(p: Any, rank: int) -> str:
        return f"{evaluation.classes[p.argsort()[-rank]]} ({p[p.argsort()[-rank]]:.0%})"

    sure = int((best * right).argmax())
    out.append(Told("very sure", evaluation.texts[sure], name(probs[sure], 1)))
    torn = int((gap + 1.0 * (best < 0.3)).argmin())
    both = f"{name(probs[torn], 1)} or {name(probs[torn], 2)}"
    out.append(Told("honestly torn", evaluation.texts[torn], both))
    if evaluation.ood_probs is not None and evaluation.ood_texts is not None:
        odd = int(evaluation.ood_probs.max(axis=1).argmin())
        p = evaluation.ood_probs[odd]
        said = f"ask a human; at best {name(p, 1)}"
        out.append(Told("never seen this kind", evaluation.ood_texts[odd], said))
    return out


def finish(out: Path, evaluations: list[Evaluation], data: DemoCorpus) -> list[dict[str, Interval]]:
    """Write the report that compares the arms."""
    facts = {
        "source": "sentences of the standard library's docstrings, routed to their topic",
        "classes": ", ".join(data.train.classes),
        "rows": f"{len(data.train)} training, {len(data.calibration)} calibration, {len(data.test)} test",
        "out-of-distribution rows": f"{len(data.ood)} of installed packages' docstrings",
        "SHA-256": data.digest,
    }
    notes = ["Names of modules and functions are masked. The text drifts with the Python version."]
    return work.write_outputs(out, evaluations, work.metadata("kilobayes demo", facts, notes))
