"""From whatever a user names as data to one table; the hub is asked only for what is no local path."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kilobayes.errors import KilobayesError, nearest
from kilobayes.hub import first_line, local_path, reachable, told_offline
from kilobayes.tasks.arrow import from_dataset
from kilobayes.tasks.table import SUFFIXES, Table, read_file, stem_and_kind

ALIASES = {"validation": ("valid", "val", "dev"), "test": ("eval",), "train": ("training",)}
ORDER = ("train", "validation", "test")


def splits(source: Any) -> list[str]:
    """Names of the splits of a source, train, validation and test first. Anything without splits is
    ``["train"]``.

    Raises:
        KilobayesError: no such path, a directory without data, or a hub id that cannot be reached.
    """
    if isinstance(source, Mapping) and _from(source, "datasets"):
        return _sorted(source)
    if not isinstance(source, str | Path):
        return ["train"]
    path, name, config = _parse(source)
    if path is None:
        return _sorted(_ask_hub(name, "get_dataset_split_names", name, config))
    if path.is_file():
        return ["train"]
    saved = _saved_dataset(path)
    return splits(saved) if saved is not None else _sorted(_files(path))


def read_source(source: Any, split: str | None) -> Table:
    """The table of one split of a source; see :func:`kilobayes.tasks.data.load_examples` for what a source
    may be.

    Raises:
        KilobayesError: as :func:`splits`, and for a split that is not there.
    """
    if isinstance(source, str | Path):
        path, name, config = _parse(source)
        if path is None:
            chosen = _choose(str(source), splits(source), split)
            return from_dataset(
                f"{source} ({chosen})", _ask_hub(name, "load_dataset", name, config, split=chosen)
            )
        if path.is_file():
            _choose(path.name, ["train"], split)
            return read_file(path)
        saved = _saved_dataset(path)
        if saved is not None:
            return read_source(saved, split)
        files = _files(path)
        return read_file(files[_choose(str(source), _sorted(files), split)])
    if isinstance(source, Mapping) and _from(source, "datasets"):
        chosen = _choose("the dataset", _sorted(source), split)
        return from_dataset(f"the split {chosen}", source[chosen])
    if _from(source, "datasets"):
        return from_dataset("the dataset", source)
    _choose("the data", ["train"], split)
    table = _from_memory(source)
    lengths = {name: len(values) for name, values in table.columns.items()}
    if len(set(lengths.values())) > 1:
        raise KilobayesError(
            "the columns differ in length", ", ".join(f"{k}: {v}" for k, v in lengths.items())
        )
    if len(table) == 0:
        raise KilobayesError(f"{table.name} has no rows")
    return table


def _from(value: Any, library: str) -> bool:
    return type(value).__module__.split(".")[0] == library


def _sorted(names: Any) -> list[str]:
    known = [str(name) for name in names]
    return [name for name in ORDER if name in known] + sorted(name for name in known if name not in ORDER)


def _choose(where: str, present: list[str], split: str | None) -> str:
    if split is None:
        if len(present) == 1:
            return present[0]
        raise KilobayesError(
            f"which split of {where}?", f"found: {', '.join(present)}", "name one of these splits"
        )
    for name in (split, *ALIASES.get(split, ())):
        if name in present:
            return name
    guess = nearest(split, present)
    raise KilobayesError(
        f'{where} has no split "{split}"',
        f"found: {', '.join(present)}",
        f'did you mean "{guess}"?' if guess else "",
    )


def _files(directory: Path) -> dict[str, Path]:
    """Split name to file."""
    found: dict[str, Path] = {}
    for path in sorted(directory.iterdir()):
        name, kind = stem_and_kind(path)
        if kind and path.is_file() and not name.startswith((".", "dataset_info")):
            if name in found:
                raise KilobayesError(
                    f'{directory} has the split "{name}" twice',
                    f"{found[name].name} and {path.name}",
                    "keep one",
                )
            found[name] = path
    if not found:
        raise KilobayesError(
            f"{directory} holds no data",
            f"looked for {', '.join('train' + suffix for suffix in SUFFIXES)}",
            "name a file, or a directory with such files",
        )
    return found


def _saved_dataset(directory: Path) -> Any:
    """A dataset written by ``save_to_disk``, or None."""
    if not any((directory / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return None
    datasets = importlib.import_module("datasets")
    try:
        return datasets.load_from_disk(str(directory))
    except Exception as error:
        raise KilobayesError(f"{directory} is not a readable saved dataset", first_line(error)) from None


def _parse(source: str | Path) -> tuple[Path | None, str, str | None]:
    """A local path, or the name and configuration (``name:configuration``) of a dataset on the hub."""
    name, colon, config = str(source).rpartition(":")
    if isinstance(source, Path) or not colon or Path(source).exists() or "/" in config:
        name, config = str(source), ""
    return local_path(source if isinstance(source, Path) else name), name, config or None


def _ask_hub(name: str, function: str, *args: Any, **keywords: Any) -> Any:
    if not told_offline() and not reachable():
        raise KilobayesError(
            f'there is no local file or directory "{name}", and the hub cannot be reached',
            "no connection",
            "give a file or directory, or set HF_HUB_OFFLINE=1 to use a copy fetched earlier",
        )
    datasets = importlib.import_module("datasets")
    try:
        return getattr(datasets, function)(*args, **keywords)
    except Exception as error:  # network, missing repository or configuration: many types in three libraries
        text = first_line(error)
        remedy = "check the name and the network, or give a file or directory"
        if "onfig name" in text:
            remedy = f'name the configuration as "{name}:CONFIGURATION"'
        raise KilobayesError(
            f'there is no local file or directory "{name}", and the hub gave no such dataset', text, remedy
        ) from None


def _from_memory(source: Any) -> Table:
    if _from(source, "pandas") and hasattr(source, "columns"):
        plain = source.astype(object).where(source.notna(), None)
        return Table("the data frame", {str(key): _plain(plain[key]) for key in plain.columns})
    if isinstance(source, Mapping):
        return Table("the data", {str(key): _plain(values) for key, values in source.items()})
    if isinstance(source, tuple) and len(source) == 2 and not any(isinstance(part, str) for part in source):
        table = _from_texts(_plain(source[0]))
        return (
            table if source[1] is None else Table(table.name, {**table.columns, "label": _plain(source[1])})
        )
    rows = _plain(source)
    if rows and isinstance(rows[0], Mapping):
        keys = dict.fromkeys(key for row in rows if isinstance(row, Mapping) for key in row)
        odd = next((i for i, row in enumerate(rows, 1) if not isinstance(row, Mapping)), None)
        if odd is not None:
            raise KilobayesError(
                f"row {odd} of the data is no dictionary", f"found {type(rows[odd - 1]).__name__}"
            )
        return Table("the data", {str(key): _plain([row.get(key) for row in rows]) for key in keys})
    return _from_texts(rows)


def _from_texts(texts: list[Any]) -> Table:
    if texts and all(
        isinstance(text, Sequence) and not isinstance(text, str) and len(text) == 2 for text in texts
    ):
        return Table(
            "the data", {"sentence1": [text[0] for text in texts], "sentence2": [text[1] for text in texts]}
        )
    return Table("the data", {"text": texts})


def _plain(values: Any) -> list[Any]:
    """A list of Python values from a list, array, series or tensor."""
    if hasattr(values, "tolist"):
        return list(values.tolist())
    if isinstance(values, str | bytes) or not hasattr(values, "__iter__"):
        raise KilobayesError("the data are not a list of rows", f"found {type(values).__name__}")
    return [
        value.item() if hasattr(value, "item") and not hasattr(value, "__len__") else value
        for value in values
    ]
