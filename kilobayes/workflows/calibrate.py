"""A posterior for an adapter that was trained elsewhere, or another one for a run: fitted, not trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from kilobayes import host, spec, store
from kilobayes.energy import ModelEnergy
from kilobayes.errors import KilobayesError
from kilobayes.metrics.cost import measure
from kilobayes.models import load_base
from kilobayes.options import Options
from kilobayes.posteriors import Point, Temperature, ask
from kilobayes.posteriors.wrapping import Wrapping
from kilobayes.random import generator
from kilobayes.tasks.classify import Classify
from kilobayes.tasks.data import Examples, load_examples
from kilobayes.tree import map_params, size
from kilobayes.types import Params, Posterior, Progress
from kilobayes.workflows.attach import card_of, device_of
from kilobayes.workflows.calibration_rows import HELD, Rows, Sources, notes_on, place, read_rows
from kilobayes.workflows.data import load_as_trained, reads
from kilobayes.workflows.finetune import Fitted, fingerprint_of, load
from kilobayes.workflows.lora_folder import chosen_classes, describe, hosted

LENGTH = 512  # tokens, where the base takes more


@dataclass(frozen=True, eq=False)
class Calibrated:
    """What calibration gives.

    Attributes:
        before: the model as it was.
        fitted: the same model with its new posterior.
        notes: what a reader must know.
    """

    before: Fitted
    fitted: Fitted
    rows: Rows
    notes: list[str]


@dataclass(frozen=True, eq=False)
class _Standing(ModelEnergy):
    """Calibration rows that stand for those trained on; remembers whether it was asked for them."""

    asked: list[bool] = field(default_factory=list)

    @property
    def train(self) -> ModelEnergy:
        self.asked.append(True)
        return self


def calibrate(
    folder: Path,
    sources: Sources,
    posterior: Any = None,
    *,
    model: str | None = None,
    classes: Sequence[str] | None = None,
    max_length: int | None = None,
    samples: int | None = None,
    dtype: str = "float32",
    device: str = "auto",
    seed: int = 0,
) -> Calibrated:
    """Fit a posterior to a finished adapter; no weight is trained.

    Args:
        folder: of a plain PEFT LoRA, or of a run.
        posterior: what to fit. By default a temperature, around the run's own posterior if it has one; a run
            whose posterior was fitted is fitted again.
        model: the base model, if it is not where the folder says.
        classes: of a LoRA, in index order, where no configuration names them and their sorted order is wrong.
        max_length: of a LoRA, longest row in tokens; by default what the base takes, at most 512.
        samples: draws that predictions average over; the run's own, or 10.
        dtype, seed: of a LoRA: the base's precision, and what draws depend on. A run keeps its own.

    Raises:
        KilobayesError: no adapter, one that cannot be calibrated, rows that do not fit it, too few rows, or a
            posterior that only training gives.
    """
    wanted = None if posterior is None else spec.posterior(posterior)
    if (folder / "posterior.json").exists():
        before, rows = _run(folder, sources, model, device)
    else:
        if wanted is not None:
            check(wanted, [])
        before, rows = _lora(folder, sources, model, classes, max_length, dtype, device, seed)
    wanted = chosen(wanted, before.posterior)
    held = before.encode(rows.calibration)
    notes = notes_on(rows, before.predict(held).probs.argmax(dim=1).numpy())
    standing = _Standing(before.model, before.task, held)
    energy: ModelEnergy = standing
    if rows.train is not None:
        energy = ModelEnergy(before.model, before.task, held, trained=before.encode(rows.train))
    with measure() as cost:
        state = start(wanted, before.posterior, before.state, len(energy.labels))
        state = ask.fit(wanted, state, energy, generator(before.card.seed, 6))
    if standing.asked:
        notes.append("No training rows were given: the calibration rows stand for them in the fit.")
    card = replace(before.card, posterior=repr(wanted), samples=samples or before.card.samples)
    fitted = replace(before, posterior=wanted, state=state, card=card, cost=dict(cost), truncated=0)
    return Calibrated(before, fitted.calibrated(rows.calibration), rows, notes)


def _run(folder: Path, sources: Sources, model: str | None, device: str) -> tuple[Fitted, Rows]:
    card = store.read_card(folder)  # the data first: loading a model takes longer

    def read(source: Any, split: str | None) -> Examples:
        given: dict[str, Any] = {"classes": card.classes, "limit": sources.limit, **sources.columns}
        return load_as_trained(folder, source, split, read=reads(card), **given)

    rows = read_rows(sources, read)
    return load(folder, model=model, device=device), rows


def _lora(
    folder: Path,
    sources: Sources,
    model: str | None,
    classes: Sequence[str] | None,
    max_length: int | None,
    dtype: str,
    device: str,
    seed: int,
) -> tuple[Fitted, Rows]:
    known = describe(folder, model)
    columns: dict[str, Any] = dict(sources.columns)
    found: list[str] = []
    if classes is None and known.classes is None:
        many = place(sources.data, sources, HELD) if not sources.split else (sources.data, sources.split)
        many = many if sources.train is None else place(sources.train, sources, ("train",))
        found = load_examples(*many, **columns).classes
    names = chosen_classes(known, classes, found)

    def read(source: Any, split: str | None) -> Examples:
        return load_examples(source, split, classes=names, limit=sources.limit, **columns)

    rows = read_rows(sources, read)
    base = load_base(known.base, names, dtype=dtype, device=device_of(device))
    print_ = fingerprint_of(base)
    adapted = hosted(known, base)
    longest = min(max_length or LENGTH, base.longest or LENGTH)
    options = Options(model=known.base, dtype=dtype, seed=seed)
    about = {"classes": names, "paired": rows.calibration.pairs is not None}
    about["label_kind"] = "int" if names == [str(i) for i in range(len(names))] else "str"
    card = card_of(options, adapted, Point(), print_, longest, **about)
    state = ended(Point(), host.read(adapted), len(rows.calibration))
    return Fitted(adapted, Classify(base.tokenizer, tuple(names), longest), Point(), state, card), rows


def fits(part: Any) -> bool:
    """Whether a posterior is fitted after training."""
    return getattr(type(part), "fit", None) not in (None, Wrapping.fit)


def chosen(wanted: Posterior | None, own: Posterior) -> Posterior:
    """What is fitted: what is wanted, or a temperature around the run's own, or that again if it was fitted.

    Raises:
        KilobayesError: a part of the posterior that only training gives, and that the run does not have.
    """
    if wanted is None:
        wanted = own if any(fits(part) for part in ask.chain(own)) else Temperature(own)
    check(wanted, [repr(part) for part in ask.chain(own)])
    return wanted


def check(wanted: Posterior, own: list[str]) -> None:
    """Raises:
    KilobayesError: a part of the posterior that only training gives, and that the run does not have.
    """
    for part in ask.chain(wanted):
        if repr(part) in own or fits(part) or isinstance(part, Point):
            continue
        raise KilobayesError(
            f"{spec.format(part)} comes of training, and a finished adapter has only its last weights",
            remedy="fit one that needs no more: Temperature(), Temperature(TFB()) or Temperature(Laplace())",
        )


def start(wanted: Posterior, posterior: Posterior, state: Any, rows: int) -> Any:
    """The state to fit: what training gave the run's own posterior is kept, all else starts at its mean.

    Raises:
        KilobayesError: the posterior has another number of members.
    """
    theta = posterior.mean(state)
    if ask.members(wanted) != size(theta):
        raise KilobayesError(
            f"{spec.format(wanted)} has {ask.members(wanted)} members", f"the adapter has {size(theta)}"
        )
    own: dict[str, Any] = {}
    for part in ask.chain(posterior):
        own[repr(part)] = state
        state = part.inner(state) if isinstance(part, Wrapping) else state

    def build(part: Any) -> Any:
        if isinstance(part, Wrapping):
            return part.around(begun(part, theta), build(part.base))
        return own[repr(part)] if repr(part) in own and not fits(part) else ended(part, theta, rows)

    return build(wanted)


def begun(posterior: Any, theta: Params) -> Any:
    """The state before training. Where that started is not known; zero stands for it, around which a prior is
    then centred."""
    return posterior.init(map_params(torch.zeros_like, theta), generator(0, 3))


def ended(posterior: Any, theta: Params, rows: int) -> Any:
    """The state after a training of one step that ended at these weights."""
    return posterior.observe(begun(posterior, theta), theta, Progress(1, 1, 1, rows))
