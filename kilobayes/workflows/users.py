"""The users of a collaboration: their names and rows, with classes that they have in common."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kilobayes.errors import KilobayesError, nearest
from kilobayes.options import Options
from kilobayes.tasks.data import Examples, available_splits, load_examples
from kilobayes.tasks.split import stratified_holdout
from kilobayes.tasks.table import stem_and_kind
from kilobayes.tasks.text import Documents
from kilobayes.workflows.data import columns, load_splits, reader
from kilobayes.workflows.texts import load_texts

Rows = Examples | Documents


@dataclass(frozen=True, eq=False)
class Own:
    """A user's rows: to train on, to measure trust on (None where none are held out), and to report on."""

    train: Rows
    trust: Rows | None
    test: Rows
    notes: tuple[str, ...] = ()


def listed(users: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Data by user, from a folder with a folder or file of data for each, or from a mapping.

    Raises:
        KilobayesError: no such folder, fewer than two users, a name that no folder can have, or one twice.
    """
    found: dict[str, Any]
    if isinstance(users, Mapping):
        found = {str(name): source for name, source in users.items()}
        for name, source in found.items():
            if isinstance(source, str | Path) and _is_path(source) and not Path(source).exists():
                raise KilobayesError(f"the data of user {name} are missing", f"no {source}", "check users")
    else:
        found = _in_folder(Path(users)) if str(users) else {}
    if len(found) < 2:
        raise KilobayesError(
            "a collaboration needs at least two users",
            f"found {', '.join(found) or 'none'}",
            "name a folder with a folder or file for each, as in users: people; alone, kilobayes train",
        )
    for name in found:
        if not re.fullmatch(r"[^\W.][\w.@+ -]{0,99}", name):
            raise KilobayesError(f"{name!r:.60} is no name of a user", "", "use letters, digits, - and _")
    return found


def _is_path(source: str | Path) -> bool:
    return isinstance(source, Path) or source.startswith((".", "/", "~")) or bool(Path(source).suffix)


def _in_folder(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        there = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        guess = nearest(folder.name, there)
        raise KilobayesError(
            f"there is no folder of users {folder}",
            "it is a file" if folder.exists() else "no such folder",
            f"did you mean {folder.parent / guess}?" if guess else "as in users: people",
        )
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        plain = path.name.lower().removesuffix(".gz").endswith(".txt")
        name = path.name if path.is_dir() else stem_and_kind(path)[0].removesuffix(".txt")
        if path.name.startswith(".") or not (path.is_dir() or plain or stem_and_kind(path)[1]):
            continue
        if name in found:
            raise KilobayesError(f"user {name} is there twice", f"{found[name]} and {path}", "keep one")
        found[name] = str(path)
    return found


@contextmanager
def _of(name: str) -> Iterator[None]:
    """Errors within name the user."""
    try:
        yield
    except KilobayesError as error:
        raise KilobayesError(f"user {name}: {error.wrong}", error.found, error.remedy) from None


def read(options: Options, users: Mapping[str, Any], classes: Sequence[str] | None = None) -> dict[str, Own]:
    """Every user's rows.

    Where a user has no test split, half of the rows held out are for trust, and half to report on.

    Args:
        users: by name: what ``--data`` takes, data in memory, or :class:`Own` as it is.
        classes: of all users; None for those that they have together.

    Raises:
        KilobayesError: as reading data, with the user's name; a user whose classes nobody else has; prompts
            that differ.
    """
    if options.task == "lm":
        return {name: _texts(options, name, source) for name, source in users.items()}
    known = list(classes) if classes else _classes(options, users)
    found = {name: _examples(options, name, source, known) for name, source in users.items()}
    first = next(iter(found))
    for name, own in found.items():
        one, other = found[first].train, own.train
        assert isinstance(one, Examples)
        assert isinstance(other, Examples)
        if one.prompt != other.prompt or (one.pairs is None) != (other.pairs is None):
            raise KilobayesError(
                f"the rows of users {first} and {name} are of different kinds",
                "other columns or templates",
                "name the columns, or the --template",
            )
    return found


def _classes(options: Options, users: Mapping[str, Any]) -> list[str]:
    """The classes of all users together, in the order of their kind.

    Raises:
        KilobayesError: a user's classes are nobody else's.
    """
    each: dict[str, list[str]] = {}
    for name, source in users.items():
        if isinstance(source, Own):
            assert isinstance(source.train, Examples)
            each[name] = source.train.classes
            continue
        with _of(name):
            there = available_splits(source)
            split = "train" if "train" in there or len(there) != 1 else there[0]
            how = reader(options.task, template=options.template, answers=options.answers)
            each[name] = how(source, split, **columns(options)).classes
    lists = list(each.values())
    if all(own == lists[0] for own in lists):
        return lists[0]
    for name, own in each.items():
        others = {c for other, theirs in each.items() if other != name for c in theirs}
        if not others & set(own):
            raise KilobayesError(
                f"user {name} has no class in common with any other",
                f"{', '.join(own)[:80]}; others have {', '.join(sorted(others))[:80]}",
                "check its labels; if that is meant, name all, as in classes: a,b,c",
            )
    union = list(dict.fromkeys(c for own in lists for c in own))
    return load_examples({"text": union, "label": union}).classes


def _examples(options: Options, name: str, source: Any, classes: Sequence[str]) -> Own:
    if isinstance(source, Own):
        return source
    with _of(name):
        found = load_splits(options, source, classes)
        trust, test = found.calibration, found.test
        if not found.own_test:
            first, second = stratified_holdout(test.labels or [], 0.5, options.seed)
            trust, test = test.take(first), test.take(second)
        return Own(found.train, trust, test, _notes(name, found.notes, found.own_test))


def _texts(options: Options, name: str, source: Any) -> Own:
    if isinstance(source, Own):
        return source
    with _of(name):
        found = load_texts(options, source)
        own = found.test_name != "calibration"
        trust, test = found.calibration, found.test
        if not own:
            trust, test = test.held_out(0.5, options.seed)
        return Own(found.train, trust, test, _notes(name, found.notes, own))


def _notes(name: str, notes: Sequence[str], own_test: bool) -> tuple[str, ...]:
    kept = [note for note in notes if own_test or not note.startswith("There is no test split")]
    return tuple(f"{name}: {note}" for note in kept)


def lacking(own: Mapping[str, Own]) -> list[str]:
    """A note for each user who has no training row of some class."""
    out = []
    for name, rows in own.items():
        if isinstance(rows.train, Examples):
            seen = {rows.train.classes[label] for label in rows.train.labels or []}
            missing = [c for c in rows.train.classes if c not in seen]
            out += [f"{name}: no training rows of {', '.join(missing)}."] if missing else []
    return out
