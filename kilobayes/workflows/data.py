"""Which rows a run trains on, calibrates on and is evaluated on."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kilobayes.card import Card
from kilobayes.errors import KilobayesError
from kilobayes.options import Options
from kilobayes.run_yaml import read_yaml
from kilobayes.tasks.data import Examples, available_splits, limited, load_examples
from kilobayes.tasks.prompt import Prompt
from kilobayes.tasks.questions import load_questions
from kilobayes.tasks.split import stratified_holdout

Read = Callable[..., Examples]  # as load_examples

TESTS = ("test", "validation", "dev", "valid", "eval")


@dataclass(frozen=True)
class Splits:
    """The rows of a run.

    Attributes:
        calibration: rows that are never trained on, or None with ``calibration`` 0.
        test: rows to evaluate on; the calibration rows where there are no others.
        own_test: whether ``test`` is apart from the calibration rows.
        notes: what a reader of the report must know about them.
    """

    train: Examples
    calibration: Examples | None
    test: Examples
    ood: Examples | None
    test_name: str
    own_test: bool
    notes: list[str]


def columns(options: Options) -> dict[str, Any]:
    return {
        "text_column": options.text_column,
        "pair_column": options.pair_column,
        "label_column": options.label_column,
    }


def reader(task: str, prompt: Prompt | None = None, **asked: Any) -> Read:
    """How the rows of a task are read: as :func:`load_examples` does, or as prompts.

    Args:
        prompt: how other rows of the same run were put.
        asked: ``template`` and ``answers``, where that is not known yet.
    """
    if task != "choice":
        return load_examples
    return functools.partial(load_questions, prompt=prompt, **({} if prompt else asked))


def load_splits(options: Options, source: Any = None, classes: Sequence[str] | None = None) -> Splits:
    """Read what ``options`` name; calibration rows are held out of training by class unless named.

    Args:
        classes: in their order; None for those of the training rows.

    Raises:
        KilobayesError: as reading examples; fewer than two classes; no data named.
    """
    source = source if source is not None else options.data
    if isinstance(source, str) and not source:
        raise KilobayesError("no data is named", remedy="as in --data train.csv")
    named = columns(options)
    there = available_splits(source)
    train_split = "train" if "train" in there or len(there) != 1 else there[0]
    read = reader(options.task, template=options.template, answers=options.answers)
    everything = read(source, train_split, classes=classes, **named)
    if len(everything.classes) < 2:
        raise KilobayesError(
            "classification needs at least two classes", f"found {everything.classes}", "check --label-column"
        )
    train = everything
    if options.limit_train is not None:
        train = limited(everything, options.limit_train, options.seed)
    known, read = everything.classes, reader(options.task, everything.prompt)
    share = options.held_out()
    calibration: Examples | None = None
    if share:
        wanted: float | int = share if share < 1 else int(share)
        kept, held = stratified_holdout(train.labels or [], wanted, options.seed)
        train, calibration = train.take(kept), train.take(held)
    elif share is None and options.calibration in there:
        calibration = read(source, options.calibration, classes=known, **named)
    elif share is None:
        split = first_test(available_splits(options.calibration))
        calibration = read(options.calibration, split, classes=known, **named)
    test, test_name, notes = _test(options, source, there, known, read)
    if own_test := test is not None:
        evaluated = test
    elif calibration is not None:
        evaluated = calibration
    else:
        raise KilobayesError(
            "there are no rows to evaluate on", "no test split, and --calibration 0", "name some with --test"
        )
    if train_split in (test_name, options.test):
        notes.append("The rows evaluated on were trained on.")
    ood = None
    if options.ood:
        ood = read(
            options.ood, first_test(available_splits(options.ood)), need_labels=False, limit=options.limit
        )
    _alike(train, {"calibration": calibration, "test": evaluated, "out-of-distribution": ood})
    notes += repeated(train, evaluated) if own_test else []
    return Splits(train, calibration, evaluated, ood, test_name, own_test, notes)


def _test(
    options: Options, source: Any, there: list[str], known: list[str], read: Read
) -> tuple[Examples | None, str, list[str]]:
    named = columns(options)
    if options.test and options.test not in there:
        name = options.test
        test = read(name, first_test(available_splits(name)), classes=known, limit=options.limit, **named)
        return test, name, []
    name = options.test or next((t for t in TESTS if t in there and t != options.calibration), "")
    if name:
        try:
            test = read(source, name, classes=known, limit=options.limit, **named)
            return test, name, []
        except KilobayesError:
            if options.test or name != "test" or "validation" not in there:
                raise  # a hub's test split without labels falls back to validation; anything else is an error
            test = read(source, "validation", classes=known, limit=options.limit, **named)
            return test, "validation", ["The test split has no usable labels; validation is used."]
    return (
        None,
        "calibration",
        ["There is no test split: the figures are of the rows that were also calibrated on."],
    )


def _alike(train: Examples, others: dict[str, Examples | None]) -> None:
    for name, rows in others.items():
        if rows is not None and (rows.pairs is None) != (train.pairs is None):
            raise KilobayesError(
                f"the {name} rows are not of the kind of the training rows",
                "single texts in one, pairs in the other",
                "name the columns with --text-column and --pair-column",
            )


def repeated(train: Examples, test: Examples) -> list[str]:
    """A note if rows that are evaluated on were also trained on, word for word."""
    seen = set(zip(train.texts, train.pairs or train.texts, strict=True))
    count = sum(row in seen for row in zip(test.texts, test.pairs or test.texts, strict=True))
    if not count:
        return []
    return [f"{count} of the {len(test)} rows evaluated on are also among the training rows, word for word."]


def first_test(splits: list[str]) -> str | None:
    return next((t for t in TESTS if t in splits), splits[0] if splits else None)


def reads(card: Card) -> Read:
    """How the rows of a saved run are read."""
    return reader(card.task, card.prompt)


def load_as_trained(
    folder: Path, source: Any, split: str | None = None, *, read: Read = load_examples, **given: Any
) -> Examples:
    """Rows for a run, from the columns that it was trained on where they are there and no others are named.

    Args:
        folder: the run's; its run.yaml names the columns.
        read: how its rows are read.
        given: as :func:`load_examples` takes them; columns that are None are looked up.

    Raises:
        KilobayesError: as reading examples.
    """
    settings = read_yaml(folder / "run.yaml") if (folder / "run.yaml").exists() else {}
    names = [f"{kind}_column" for kind in ("text", "pair", "label")]
    trained = {k: settings[k] for k in names if settings.get(k) and given.get(k) is None}
    if not given.get("need_labels", True):
        trained.pop("label_column", None)
    if trained:
        with contextlib.suppress(KilobayesError):  # other data may name them differently
            return read(source, split, **(given | trained))
    return read(source, split, **given)
