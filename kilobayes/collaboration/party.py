"""A party of users on a base model, from settings and data: what a simulation and a client begin with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from kilobayes import spec, store
from kilobayes.checkpoint import Checkpoint
from kilobayes.collaboration.members import Party, user_seed
from kilobayes.collaboration.settings import Together
from kilobayes.collaboration.subjects import Choosing, Subject, Writing
from kilobayes.errors import KilobayesError
from kilobayes.files import digest
from kilobayes.host.vocabulary import check_output
from kilobayes.models import fingerprint, load_causal
from kilobayes.options import Options
from kilobayes.posteriors import SWA, SWAG, Point, Temperature, ask
from kilobayes.tasks.data import Examples, available_splits
from kilobayes.tasks.lm import Language
from kilobayes.tasks.text import load_documents, splits
from kilobayes.types import Posterior
from kilobayes.workflows import users
from kilobayes.workflows.attach import attach, card_of, device_of, member_seeds, start
from kilobayes.workflows.data import columns, first_test, reader
from kilobayes.workflows.finetune import fingerprint_of
from kilobayes.workflows.folder import CHECKPOINT
from kilobayes.workflows.kinds import kind_of
from kilobayes.workflows.learn import settings_of

__all__ = ["Party", "check_posterior", "gather"]


def check_posterior(posterior: Posterior, together: Together) -> None:
    """Raises KilobayesError for a posterior that users cannot have, or whose moments cannot be shared."""
    kinds = list(ask.chain(posterior))
    inner = kinds[-1]
    known = isinstance(inner, Point | SWA | SWAG) and not getattr(inner, "prior_precision", 0.0)
    if not known or not all(isinstance(kind, Temperature) for kind in kinds[:-1]):
        raise KilobayesError(
            f"users cannot be trained under {spec.format(posterior)}",
            "known: Point(), SWA(), SWAG() and Temperature() of these",
            "take one of these; kilobayes calibrate fits others to a user's run afterwards",
        )
    if together.share == "moments" and not (isinstance(inner, SWAG) and inner.rank == 0):
        raise KilobayesError(
            "moments are means and variances of single weights",
            f"posterior {spec.format(posterior)}",
            "as in posterior: SWAG(rank=0); or share: mean",
        )


def gather(
    options: Options,
    together: Together,
    people: Mapping[str, Any],
    folder: Path,
    classes: Sequence[str] | None = None,
    *,
    rates: Sequence[float] | None = None,
    starts: Sequence[int] | None = None,
    watch: Callable[..., None] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Party:
    """Users with their data, ready to train.

    Args:
        people: data by user, each as ``kilobayes train --data`` takes it, or in memory, or as
            :class:`~kilobayes.workflows.users.Own`. One user alone will do, with ``classes``.
        folder: where the checkpoint is kept; one that is there is gone on with.
        classes: of all users together, which one user alone cannot know; None for ``together.classes``, else
            those of ``people``.
        rates: peak learning rates of the users, in the place of ``options.lr``.
        starts: seeds of the users' first weights; by default all start from the same.
        watch: told of every step.

    Raises:
        KilobayesError: as reading data; other settings than those of the checkpoint.
    """
    posterior = spec.posterior(options.posterior)
    check_posterior(posterior, together)
    own = users.read(options, people, classes or together.named())
    for line in (*users.lacking(own), *(note for rows in own.values() for note in rows.notes)):
        say(f"note: {line}")
    lacks = [name for name, rows in own.items() if rows.trust is None]
    if lacks and (together.scheme == "validation" or ask.needs_calibration(posterior)):
        raise KilobayesError(
            f"user {lacks[0]} has no rows to measure trust on", "calibration 0", "as in calibration: 0.2"
        )
    subject, base, print_ = _subject(options, next(iter(own.values())).train)
    data, mine = subject.joined([rows.train for rows in own.values()])
    parts = [{"trust": rows.trust, "test": rows.test} for rows in own.values()]
    held = [{k: None if v is None else subject.encode(v) for k, v in part.items()} for part in parts]
    seeds = [user_seed(options.seed, name) for name in own]
    settings = replace(settings_of(options, seeds), steps=together.steps, max_seconds=0.0)
    if rates is not None:
        settings = replace(settings, lr=tuple(rates))
    identity = (
        options.identity()
        | asdict(together)
        | {"base": print_, "rates": list(rates or []), "starts": list(starts or [])}
    )
    identity["users"] = {name: _digest(rows) for name, rows in own.items()}
    begin = member_seeds(options.seed, 1) * len(own) if starts is None else list(starts)
    first = next(iter(own.values())).train
    given = first if isinstance(first, Examples) else None
    task: Any = subject.task
    about = {"classes": list(given.classes), "paired": given.pairs is not None} if given else {}
    prompt = store.put(given.prompt if given else None)
    card = card_of(options, subject.model, posterior, print_, task.max_length, **about, **prompt)
    return Party(
        names=tuple(own),
        subject=subject,
        posterior=posterior,
        settings=settings,
        together=together,
        data=data,
        own=mine,
        held=held,
        reference=_reference(options, together, subject, given),
        start=start(subject.model, base, begin),
        checkpoint=Checkpoint(folder / CHECKPOINT, identity, resume=True),
        card=card,
        options=options,
        sources={name: str(v) for name, v in people.items() if isinstance(v, str | Path)},
        watch=watch,
    )


def _subject(options: Options, rows: Any) -> tuple[Subject, Any, str]:
    """The hosted model with its task, its base, and the base's fingerprint."""
    device = device_of(options.device)
    if isinstance(rows, Examples):
        kind = kind_of(options.task)
        base = kind.load(options.model, rows.classes, options.dtype, device)
        print_, model = fingerprint_of(base), attach(base, options)
        longest = min(options.max_length, base.longest or options.max_length)
        return Choosing(model, kind.make(base, rows.classes, longest, rows.prompt)), base, print_
    base = load_causal(options.model, dtype=options.dtype, device=device)
    print_ = fingerprint(base.model)
    task = Language(base.tokenizer, min(options.max_length, base.longest or options.max_length))
    check_output(base.model, torch.tensor([task.encode(rows.take([0])).ids[0]], device=device))
    return Writing(attach(base, options), task), base, print_


def _reference(options: Options, together: Together, subject: Subject, like: Examples | None) -> Any:
    """The shared rows, encoded; None where none are named."""
    source = together.reference
    if not source:
        return None
    if not Path(source).exists() and "/" not in source:
        raise KilobayesError(f"there is no {source}", "of shared rows", "as in reference: texts.jsonl")
    if like is None:
        named = {"text_column": options.text_column, "answer_column": options.label_column}
        return subject.encode(load_documents(source, first_test(splits(source)), **named))
    own = {k: v for k, v in columns(options).items() if k != "label_column"}
    read = reader(options.task, like.prompt)
    found = read(source, first_test(available_splits(source)), need_labels=False, classes=like.classes, **own)
    if (found.pairs is None) != (like.pairs is None):
        raise KilobayesError(
            "the shared rows are not of the kind of the users'", "texts in one, pairs in one"
        )
    return subject.encode(replace(found, labels=None))


def _digest(rows: users.Own) -> str:
    """SHA-256 of what a user trains on."""
    train = rows.train
    whole = [train.texts, train.pairs, train.labels] if isinstance(train, Examples) else train.rows
    return digest([repr(whole)])
