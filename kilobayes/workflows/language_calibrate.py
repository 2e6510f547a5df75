"""A posterior for a finished adapter of a language model, or another one for a run: fitted, not trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from kilobayes import host, spec
from kilobayes.errors import KilobayesError
from kilobayes.files import write_text_atomically
from kilobayes.host.vocabulary import check_output
from kilobayes.lm.energy import LanguageEnergy
from kilobayes.metrics import Interval
from kilobayes.metrics.cost import measure
from kilobayes.metrics.texts import TextEvaluation
from kilobayes.models import fingerprint, load_causal
from kilobayes.options import Options
from kilobayes.posteriors import Point, ask
from kilobayes.random import generator
from kilobayes.tasks.lm import Language
from kilobayes.tasks.text import Documents, load_documents, splits
from kilobayes.workflows import language_evaluate as evaluation
from kilobayes.workflows.attach import card_of, device_of
from kilobayes.workflows.calibrate import check, chosen, ended, start
from kilobayes.workflows.calibration_rows import HELD, Sources, place
from kilobayes.workflows.calibration_run import shown, write_model
from kilobayes.workflows.data import TESTS
from kilobayes.workflows.evaluate import metadata
from kilobayes.workflows.language import FittedLanguage, load, sampling
from kilobayes.workflows.lora_folder import describe, hosted
from kilobayes.workflows.texts import for_run

LENGTH = 512  # tokens, where the base takes more
FEWEST, FEW = 100, 1000  # learned tokens to calibrate on: refused below, noted below
Arms = tuple[list[TextEvaluation], list[dict[str, Interval]]]


@dataclass(frozen=True, eq=False)
class CalibratedTexts:
    """What calibration gives.

    Attributes:
        before: the model as it was.
        fitted: the same model with its new posterior.
        held, test: texts that were calibrated on, and those to evaluate on.
        notes: what a reader must know.
    """

    before: FittedLanguage
    fitted: FittedLanguage
    held: Documents
    test: Documents | None
    notes: list[str]


@dataclass(frozen=True, eq=False)
class _Standing(LanguageEnergy):
    """Calibration texts that stand for those trained on; remembers whether it was asked for them."""

    asked: list[bool] = field(default_factory=list)

    @property
    def train(self) -> LanguageEnergy:
        self.asked.append(True)
        return self


def calibrate(
    folder: Path,
    sources: Sources,
    posterior: Any = None,
    *,
    model: str | None = None,
    max_length: int | None = None,
    samples: int | None = None,
    dtype: str = "float32",
    device: str = "auto",
    seed: int = 0,
) -> CalibratedTexts:
    """Fit a posterior to a finished adapter of a language model; no weight is trained.

    Args:
        folder, posterior, model, max_length, samples, dtype, seed: as
            :func:`kilobayes.workflows.calibrate.calibrate` takes them.
        sources: texts, as :func:`kilobayes.tasks.text.load_documents` reads them.

    Raises:
        KilobayesError: no adapter, one that cannot be calibrated, too little text, or a posterior that only
            training gives.
    """
    wanted = None if posterior is None else sampling(spec.posterior(posterior))
    own = (folder / "posterior.json").exists()
    if not own and wanted is not None:
        check(wanted, [])
    held, train, test = _texts(folder, sources)  # before the model, which takes longer to load
    before = (
        load(folder, model=model, device=device)
        if own
        else _lora(folder, model, max_length, dtype, device, seed)
    )
    wanted = chosen(wanted, before.posterior)
    tokens = before.task.encode(held)
    count = sum(tokens.counted)
    if count < FEWEST:
        raise KilobayesError(
            f"{count} learned tokens are too few to calibrate on",
            f"at least {FEWEST}, better {FEW}, are needed",
        )
    notes = [f"{count} learned tokens are few; what is fitted on them is uncertain."] if count < FEW else []
    notes += _repeated(train, held, "calibrated") + _repeated(held, test, "evaluated")
    standing = _Standing(before.model, before.task, tokens)
    energy: LanguageEnergy = standing
    trained = tokens
    if train is not None:
        trained = before.task.encode(train)
        energy = LanguageEnergy(
            before.model, before.task, tokens, trained=trained, per_row=trained.mean_counted
        )
    with measure() as cost:
        state = start(wanted, before.posterior, before.state, len(trained))
        state = ask.fit(wanted, state, energy, generator(before.card.seed, 6))
    if standing.asked:
        notes.append("No training texts were given: the calibration texts stand for them in the fit.")
    card = replace(before.card, posterior=repr(wanted), samples=samples or before.card.samples)
    fitted = replace(before, posterior=wanted, state=state, card=card, cost=dict(cost))
    return CalibratedTexts(before, fitted, held, test, notes)


def _texts(folder: Path, sources: Sources) -> tuple[Documents, Documents | None, Documents | None]:
    columns = {key: sources.columns.get(key) for key in ("text_column", "label_column")}

    def read(source: Any, prefer: Sequence[str]) -> Documents | None:
        if source is None:
            return None
        where, split = source if isinstance(source, tuple) else place(source, sources, prefer, splits)
        if (folder / "posterior.json").exists():
            return for_run(folder, where, split, columns, sources.limit)[0]
        text, answer = columns["text_column"], columns["label_column"]
        return load_documents(where, split, text_column=text, answer_column=answer).limited(sources.limit, 0)

    held = read((sources.data, sources.split) if sources.split else sources.data, HELD)
    assert held is not None
    return held, read(sources.train, ("train",)), read(sources.test, TESTS)


def _repeated(first: Documents | None, second: Documents | None, done: str) -> list[str]:
    """A note if texts are in both."""
    seen = set(map(repr, first.rows if first else []))
    count = sum(repr(row) in seen for row in (second.rows if second else []))
    other = "trained on" if done == "calibrated" else "calibrated on"
    return [f"{count} of the rows {done} on were also {other}, word for word."] if count else []


def _lora(
    folder: Path, model: str | None, max_length: int | None, dtype: str, device: str, seed: int
) -> FittedLanguage:
    known = describe(folder, model, "lm")
    base = load_causal(known.base, dtype=dtype, device=device_of(device))
    print_ = fingerprint(base.model)
    longest = min(max_length or LENGTH, base.longest or LENGTH)
    task = Language(base.tokenizer, longest)
    check_output(base.model, torch.tensor([[task.start]], device=next(base.model.parameters()).device))
    adapted = hosted(known, base)
    options = Options(model=known.base, dtype=dtype, seed=seed, task="lm")
    card = card_of(options, adapted, Point(), print_, longest)
    return FittedLanguage(adapted, task, Point(), ended(Point(), host.read(adapted), 1), card)


def write(done: CalibratedTexts, folder: Path, adapter: Path, sources: Sources) -> Arms:
    """Write the run; with test texts also the report, of the adapter before and after, which is returned."""
    cost = write_model(folder, done.fitted, sources)
    arms: Arms = ([], [])
    if done.test is not None:
        name = f"before: {evaluation.arm_name(done.before)}"
        both = [
            evaluation.evaluate(done.before, done.test, name=name),
            evaluation.evaluate(replace(done.fitted, cost=cost), done.test),
        ]
        data = {"adapter": str(adapter), "calibration rows": len(done.held), "rows evaluated": len(done.test)}
        meta = metadata(f"{adapter.name}, calibrated", data, done.notes)
        arms = both, evaluation.write_outputs(folder, both, meta)
    write_text_atomically(folder / "README.md", _readme(done, adapter, shown(sources), arms))
    return arms


def _readme(done: CalibratedTexts, adapter: Path, source: str, arms: Arms) -> str:
    card = done.fitted.card
    lines = ["", "| metric | before | after |", "|---|---|---|"] if arms[1] else []
    for key, label in (("perplexity", "perplexity"), ("nll", "NLL, nats per token"), ("ece", "ECE")):
        if arms[1]:
            before, after = (summary[key].value for summary in arms[1])
            lines.append(f"| {label} | {before:.4f} | {after:.4f} |")
    table = "\n".join(lines)
    return f"""# {adapter.name}, calibrated

`{card.posterior}`, fitted by kilobayes {card.version} on {len(done.held)} rows of {source} to the adapter in
{adapter}, on {card.base}. No weight was trained. `kilobayes generate` this folder writes with it.
{table}
"""
