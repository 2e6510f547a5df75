"""Tables from Parquet files and from the ``datasets`` library; both are pyarrow underneath."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kilobayes.errors import KilobayesError
from kilobayes.tasks.table import Table


def read_parquet(path: Path) -> Table:
    """The columns of one file that hold scalars, or lists of them.

    Raises:
        KilobayesError: damaged or not Parquet.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        return from_arrow(path.name, pyarrow.parquet.read_table(path, partitioning=None))
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        found = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise KilobayesError(
            f"{path.name} is not a readable Parquet file", found, "copy or download it again"
        ) from None


def from_arrow(name: str, table: Any) -> Table:
    """The columns of a pyarrow table that hold scalars, or lists of them as questions' options do.

    ``datasets`` writes the class names of its ``ClassLabel`` columns into the metadata; they are kept.
    """

    metadata = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    features = metadata.get("info", {}).get("features") or {}
    scalar = [f.name for f in table.schema if _plain(f.type, 2)]
    names = {
        key: features[key]["names"] for key in scalar if features.get(key, {}).get("_type") == "ClassLabel"
    }
    return Table(name, {key: table.column(key).to_pylist() for key in scalar}, names)


def _plain(kind: Any, depth: int) -> bool:
    """Whether a type is scalar and no bytes, or lists and structures of such, ``depth`` deep."""
    import pyarrow.types as kinds

    if not kinds.is_nested(kind):
        return not (kinds.is_binary(kind) or kinds.is_large_binary(kind))
    inner = [kind.field(i).type for i in range(kind.num_fields)]
    return depth > 0 and bool(inner) and all(_plain(part, depth - 1) for part in inner)


def from_dataset(name: str, dataset: Any) -> Table:
    """The columns of a ``datasets.Dataset`` that hold scalars, or lists of them.

    Raises:
        KilobayesError: another kind of object, such as a streamed dataset.
    """
    if not all(hasattr(dataset, method) for method in ("select_columns", "with_format", "__len__")):
        raise KilobayesError(f"{name} is a {type(dataset).__name__}", "a datasets.Dataset was expected")
    keep = [key for key, kind in dataset.features.items() if _readable(kind)]
    table = from_arrow(name, dataset.select_columns(keep).with_format("arrow")[:])
    names = {
        key: list(dataset.features[key].names) for key in keep if hasattr(dataset.features[key], "names")
    }
    return Table(name, table.columns, names)


def _readable(kind: Any) -> bool:
    """Whether a feature of ``datasets`` needs no decoding, as images and sounds do."""
    if isinstance(kind, dict):
        return all(_readable(part) for part in kind.values())
    if isinstance(kind, list):
        return all(_readable(part) for part in kind)
    if type(kind).__name__ in ("List", "LargeList", "Sequence"):
        return _readable(kind.feature)
    return type(kind).__name__ in ("Value", "ClassLabel")
