"""A run on another base, or with another adapter, without the task's data: Trans-LoRA (arXiv:2405.17258).

Inputs are made up and filtered, the source answers them, and the student learns the answers. The folder holds
each stage as it is done, so that a transfer that is killed goes on to the same result.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kilobayes import spec
from kilobayes.card import Card, read_card
from kilobayes.distil import classes, tokens
from kilobayes.distil.duplicates import duplicates
from kilobayes.distil.rows import Row
from kilobayes.distil.synthesis import Synthesis, synthesise
from kilobayes.errors import KilobayesError
from kilobayes.files import write_json, write_lines
from kilobayes.language import LanguageModel
from kilobayes.options import Options
from kilobayes.posteriors import ask
from kilobayes.run_yaml import write_yaml
from kilobayes.workflows import finetune, transfer_run
from kilobayes.workflows.discriminator import FACTS, Discriminator, named, read_discriminator
from kilobayes.workflows.folder import CHECKPOINT, Log, place
from kilobayes.workflows.transfer_inputs import JUDGING, Making, check_source, maker, read
from kilobayes.workflows.transfer_run import INPUTS, SYNTHESIS, Transferred


@dataclass(frozen=True)
class Plan:
    """What a transfer is, beside how its student is trained.

    Args:
        run: folder of the source.
        making: how inputs are made up.
        inputs: how many to learn from, those held out included.
        max_tries: proposals at most; 0 for twenty times ``inputs``.
        discriminator: folder; "" for the one in the source's, if it is there; ``none`` for none.
        threshold: least probability of a kept input to be real.
        objective: ``probabilities`` or ``text`` of classes, ``text`` or ``logits`` of language models.
        completions: texts of each input, of a language model.
        source_model: where the source's base is now, if it moved.

    Raises:
        KilobayesError: numbers that make no sense.
    """

    run: str
    making: Making = field(default=Making())
    inputs: int = 250
    max_tries: int = 0
    discriminator: str = ""
    threshold: float = 0.5
    objective: str = "auto"
    completions: int = 1
    source_model: str | None = None

    def __post_init__(self) -> None:
        if self.inputs < 2 or self.completions < 1 or self.max_tries < 0:
            raise KilobayesError("--inputs must be at least 2, --completions 1 and --max-tries 0")
        if not 0 <= self.threshold < 1:
            raise KilobayesError("--threshold must be at least 0 and below 1", f"found {self.threshold}")


def transfer(
    plan: Plan,
    options: Options,
    *,
    seeds: Any = None,
    unlabelled: Any = None,
    audit: Any = None,
    columns: dict[str, str | None] | None = None,
    watch: Callable[[Any, Tensor], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Transferred:
    """Make inputs, have the source answer them, train the student, save it with ``transfer.json``.

    Args:
        options: of the student: ``model`` is the target, ``calibration`` the inputs held out.
        seeds: real examples to start from; by default those that the discriminator keeps.
        unlabelled: texts to make inputs from.
        audit: real rows that made-up inputs are compared with, for the report alone.
        columns: ``text_column`` and ``pair_column`` of ``unlabelled``; others have the source's.

    Raises:
        KilobayesError: as every stage; a folder that holds another run, or this one finished.
    """
    source = Path(plan.run)
    card = read_card(source, "")
    check_source(source, card)
    default = "text" if card.task == "lm" else "probabilities"
    plan = replace(plan, objective=default if plan.objective == "auto" else plan.objective)
    (tokens if card.task == "lm" else classes).check(plan.objective)
    spec.adapter(options.adapter)
    if ask.needs_calibration(spec.posterior(options.posterior)) and not options.held_out():
        raise KilobayesError(f"{options.posterior} needs inputs held out", "none", "as in --calibration 0.2")
    options = place(transfer_run.of_source(options, source, card))
    folder = Path(options.out)
    judge = _judge(plan, source, card, options.device)
    words = plan.making.words
    if seeds is None and judge is not None:
        seeds = judge.folder / "seeds.jsonl"
    start = [] if seeds is None else read(source, card, seeds, words)
    pool = [] if unlabelled is None else read(source, card, unlabelled, words, **(columns or {}))
    known = [] if audit is None else read(source, card, audit, words)
    folder.mkdir(parents=True, exist_ok=True)
    settings = transfer_run.settings(folder, plan, options, start, pool)
    write_yaml(folder / "run.yaml", options)
    made, answers = _answered(plan, options, source, card, judge, start, pool, folder, say)
    log = Log(folder / "log.jsonl", options.resume, watch)
    try:
        fitted, learned = _student(plan, options, source, card, made.rows, answers, folder / CHECKPOINT, log)
    finally:
        log.close()
    log.whole(fitted.trained.losses.tolist())
    report = {
        "inputs": len(made.rows),
        **{k: v for k, v in asdict(made).items() if k != "rows"},
        "acceptance": None if judge is None else made.acceptance,
        "discriminator": None if judge is None else judge.report["held_out"] | {"folder": str(judge.folder)},
        "real_examples_used": len(start),
        "duplicates_of_seeds": asdict(duplicates(made.rows, start)),
        "duplicates_of_audited": asdict(duplicates(made.rows, known)) if known else None,
        "audited_accepted": float(judge.accept(plan.threshold)(known).mean()) if judge and known else None,
        **learned,
    }
    return transfer_run.finish(folder, fitted, options, settings, report)


def _judge(plan: Plan, source: Path, card: Card, device: str) -> Discriminator | None:
    own = source / "discriminator"
    if plan.discriminator == "none" or (not plan.discriminator and not (own / FACTS).is_file()):
        return None
    return read_discriminator(Path(plan.discriminator or own), card, plan.source_model, device)


def _answered(
    plan: Plan,
    options: Options,
    source: Path,
    card: Card,
    judge: Discriminator | None,
    seeds: Sequence[Row],
    pool: Sequence[Row],
    folder: Path,
    say: Callable[[str], None],
) -> tuple[Synthesis, Any]:
    """The inputs with the source's answers, from the folder where it has them."""
    begin = transfer_run.synthesis(folder) if options.resume else None
    if options.resume and begin is not None and (folder / INPUTS).exists():
        return begin, transfer_run.answers(folder, card)
    say(f"making {plan.inputs} inputs" + (" that pass the discriminator" if judge else ""))
    part = None if judge is None else JUDGING
    generator = maker(plan.making, card, seeds, pool, _writer(options, card), part, options.device)

    def keep(so_far: Synthesis) -> None:
        write_json(folder / SYNTHESIS, asdict(so_far))

    made = synthesise(
        generator, seeds, n=plan.inputs, max_tries=plan.max_tries or 20 * plan.inputs, begin=begin, keep=keep,
        accept=None if judge is None else judge.accept(plan.threshold),
    )  # fmt: skip
    say(f"{made.tries} tries, {made.rejected} rejected; now {source.name} answers")
    if card.task == "lm":
        teacher = LanguageModel.load(source, model=plan.source_model, device=options.device)
        written = tokens.write(
            teacher, made.rows, max_new_tokens=options.max_length, completions=plan.completions,
            seed=plan.making.seed,
        )  # fmt: skip
        records = [{"prompt": p, "completion": c, "cut": cut} for p, c, cut in written]
    else:
        trained = finetune.load(source, model=plan.source_model, device=options.device)
        probs = classes.targets(trained, made.rows, plan.objective)
        label = options.label_column or "label"
        records = [
            named(source, row) | {label: card.classes[int(p.argmax())], "probs": p.tolist()}
            for row, p in zip(made.rows, probs, strict=True)
        ]
    write_lines(folder / INPUTS, records)
    return made, transfer_run.answers(folder, card)


def _writer(options: Options, card: Card) -> str:
    """The base that makes inputs where no other is named: the target, as in the paper."""
    return options.model if card.task == "lm" else ""


def _student(
    plan: Plan,
    options: Options,
    source: Path,
    card: Card,
    rows: Sequence[Row],
    answers: Any,
    save: Path,
    log: Log,
) -> tuple[Any, dict[str, Any]]:
    """The student, and what it has in common with its teacher on inputs that it did not learn from."""
    share = options.held_out() or 0
    held = round(share * len(rows)) if share < 1 else int(share)
    if not 0 <= held < len(rows):
        raise KilobayesError(f"cannot hold out {held} of {len(rows)} inputs", remedy="raise --inputs")
    draw = np.random.default_rng(options.seed)
    order = draw.permutation(len(rows))
    first, last = sorted(order[held:]), sorted(order[:held])
    where = {"agreement_on": "held out" if held else "trained on"}
    if card.task == "lm":
        late = {rows[i][0] for i in last}
        own, apart = [w for w in answers if w[0] not in late], [w for w in answers if w[0] in late]
        teacher = LanguageModel.load(source, model=plan.source_model, device=options.device)
        fitted = tokens.transfer(
            options, own, apart, teacher=teacher if plan.objective == "logits" else None,
            checkpoint=save, watch=log,
        )  # fmt: skip
        return fitted, transfer_run.of_texts(fitted, teacher, source, plan, apart or own) | where
    probs: Tensor = answers
    theirs = ([rows[i] for i in last], probs[torch.tensor(last)]) if held else None
    student = classes.transfer(
        options, [rows[i] for i in first], probs[torch.tensor(first)], card.classes, theirs,
        checkpoint=save, watch=log,
    )  # fmt: skip
    told = {
        "answers": classes.told(probs, card.classes),
        "agreement": classes.agreement(student, *(theirs or (rows, probs))),
    }
    return replace(student, card=replace(student.card, label_kind=card.label_kind)), told | where


def read_report(folder: Path) -> dict[str, Any]:
    """What ``transfer.json`` says."""
    return dict(json.loads((folder / transfer_run.REPORT).read_text(encoding="utf-8")))
