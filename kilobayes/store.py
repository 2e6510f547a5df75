"""A run's folder: the mean as a PEFT checkpoint, the posterior beside it, and what made them.

``adapter_config.json`` and ``adapter_model.safetensors`` hold the posterior mean, which ``PeftModel.from_pretrained``
loads after ``import kilobayes``; ``posterior.safetensors`` and ``posterior.json`` the posterior; ``run.yaml`` the
settings. Everything is written beside its place and renamed, then read back and compared.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kilobayes import __version__, host, spec, tree
from kilobayes.checkpoint import read_tensors, write_atomically
from kilobayes.errors import KilobayesError
from kilobayes.files import write_json
from kilobayes.types import Posterior

FORMAT = 1


@dataclass(frozen=True)
class Card:
    """What a saved posterior says of itself, in ``posterior.json``.

    Attributes:
        posterior, adapter: specifications.
        base: name of the base model; ``fingerprint`` is of its frozen weights.
        classes: class names in index order.
        max_length: longest row in tokens.
        samples: draws at prediction unless asked otherwise.
        seed: seed of the draws.
        target_modules: sites of the adapter.
        dtype: of the base.
        version, format: of the library and the files.
    """

    posterior: str
    adapter: str
    base: str
    fingerprint: str
    classes: list[str]
    max_length: int
    samples: int
    seed: int
    target_modules: list[str]
    dtype: str = "float32"
    version: str = __version__
    format: int = FORMAT


def save(folder: Path, model: nn.Module, posterior: Posterior, state: Any, card: Card) -> dict[str, int]:
    """Write a run's model files; returns their sizes in bytes by part.

    Raises:
        KilobayesError: what is read back differs from what was written; nothing is lost in memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mean = posterior.mean(state)
    host.write(model, mean)
    save_adapter(folder, model)
    tensors = tree.flatten_state(state)
    write_atomically(folder / "posterior.safetensors", tensors)
    write_json(folder / "posterior.json", asdict(card))
    back, _ = read_tensors(folder / "posterior.safetensors")
    odd = tree.first_difference(back, {k: v.detach().cpu() for k, v in tensors.items()}) or _reload_difference(folder, model)
    if odd:
        raise KilobayesError(
            f"{folder} does not read back as it was written", f"first difference: {odd}", "save again to another disk"
        )
    heads = sum(tree.total_bytes(v[None] for v in h.parameters()) for h in host.heads(model).values())
    return {
        "adapter": tree.total_bytes(host.read(model).values()) - heads,
        "head": heads,
        "posterior": (folder / "posterior.safetensors").stat().st_size,
        "checkpoint": (folder / "adapter_model.safetensors").stat().st_size,
    }


def save_adapter(folder: Path, model: nn.Module) -> None:
    """PEFT's own files, each put in place by a rename."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as part:
        model.save_pretrained(part, save_embedding_layers=False)  # type: ignore[operator]
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            shutil.move(str(Path(part) / name), folder / name)


def _reload_difference(folder: Path, model: nn.Module) -> str:
    """The first leaf that a fresh load of the checkpoint gets wrong: heads have been lost here before, by others."""
    name = host.active(model)
    model.load_adapter(str(folder), adapter_name="reloaded")  # type: ignore[operator]
    theirs = {k: v.detach().clone() for k, v in host.read(model, "reloaded").items()}
    model.delete_adapter("reloaded")  # type: ignore[operator]
    model.set_adapter(name)  # type: ignore[operator]
    return tree.first_difference(theirs, {k: v.detach() for k, v in host.read(model, name).items()})


def read_card(folder: Path) -> Card:
    """The card of a run, without loading torch's tensors.

    Raises:
        KilobayesError: there is no run, or it is damaged or from a newer version.
    """
    path = folder / "posterior.json"
    if not folder.is_dir() or not path.exists():
        raise KilobayesError(
            f"{folder} is no kilobayes run",
            "it has no posterior.json" if folder.is_dir() else "there is no such folder",
            "kilobayes train --out RUN makes one",
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, Mapping):
            raise ValueError("not an object")
        known = set(Card.__dataclass_fields__)
        if found.get("format", FORMAT) > FORMAT:
            raise KilobayesError(
                f"{path} was written by a newer kilobayes", f"version {found.get('version')}", "pip install -U kilobayes"
            )
        return Card(**{k: v for k, v in found.items() if k in known})
    except (ValueError, TypeError) as error:
        raise KilobayesError(f"{path} is damaged", str(error), "copy it again from where it was made") from None


def read_state(folder: Path, card: Card) -> tuple[Posterior, Any]:
    """The posterior and its state.

    Raises:
        KilobayesError: the file is missing, damaged, or lacks a part that the posterior needs.
    """
    posterior = spec.posterior(card.posterior)
    tensors, _ = read_tensors(folder / "posterior.safetensors")
    try:
        return posterior, tree.unflatten_state(posterior, tensors)
    except KeyError as error:
        raise KilobayesError(
            f"{folder / 'posterior.safetensors'} does not hold a {card.posterior}",
            f"{error.args[0]} is missing",
            "copy the run's folder whole",
        ) from None


def check_fingerprint(card: Card, found: str) -> None:
    """Refuse a base whose frozen weights are not those the run was trained on.

    Raises:
        KilobayesError: the fingerprints differ.
    """
    if card.fingerprint != found:
        raise KilobayesError(
            f"the base model {card.base!r} is not the one this run was trained on",
            f"fingerprint {found[:12]}, trained on {card.fingerprint[:12]}",
            "name the original with --model, or train again",
        )
