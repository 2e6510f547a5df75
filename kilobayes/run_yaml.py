"""``run.yaml``: the settings of a run as flat lines, so that ``--config`` repeats it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kilobayes.errors import KilobayesError
from kilobayes.options import Options, from_mapping

LARGEST_YAML = 1 << 20  # bytes


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings of a flat run.yaml.

    Raises:
        KilobayesError: as :func:`read_flat`, or a key that is no setting.
    """
    return from_mapping(read_flat(path), str(path))


def read_flat(path: str | Path) -> Mapping[str, Any]:
    """Keys and values of a YAML file, whatever they mean.

    Raises:
        KilobayesError: no such file, no valid YAML, references or tags in it, or not flat keys and values.
    """
    import yaml

    remedy = "write lines such as lr: 0.001"
    try:
        size = Path(path).stat().st_size
        if size > LARGEST_YAML:
            raise KilobayesError(f"{path} holds no settings", f"it has {size:,} bytes", remedy)
        text = Path(path).read_text(encoding="utf-8")
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            # references to references make gigabytes, brackets in brackets take hours; settings need neither
            if isinstance(event, yaml.AliasEvent):
                raise KilobayesError(f"{path} holds references (*name)", "settings are plain values", remedy)
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > 2:
                raise KilobayesError(f"{path} is not flat", "a list in a list, or keys below a key", remedy)
        found = yaml.safe_load(text) or {}
    except FileNotFoundError:
        raise KilobayesError(
            f"{path} does not exist", remedy="name a run.yaml, or leave --config out"
        ) from None
    except OSError as error:
        raise KilobayesError(
            f"{path} cannot be read", error.strerror or str(error), "name a run.yaml"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, no such date
        lines = str(error).splitlines() or [type(error).__name__]
        where = next((line.strip() for line in lines if "line " in line), "")
        raise KilobayesError(
            f"{path} is not valid YAML", " ".join(dict.fromkeys([lines[0], where])), remedy
        ) from None
    if not isinstance(found, Mapping):
        raise KilobayesError(f"{path} holds no settings", f"a {type(found).__name__}", remedy)
    return found


def write_yaml(path: Path, options: Options) -> None:
    """The resolved settings, one key a line, so that ``--config`` repeats the run."""
    import yaml

    from kilobayes.files import write_text_atomically

    kept = {k: v for k, v in dataclasses.asdict(options).items() if k != "resume"}
    write_text_atomically(path, yaml.safe_dump(kept, sort_keys=False, allow_unicode=True))
