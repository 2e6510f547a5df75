"""A run's folder: the mean as a PEFT checkpoint, the posterior, and what made them.

``PeftModel.from_pretrained`` loads the checkpoint after ``import kilobayes``. Everything is written beside
its place and renamed, then read back and compared.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from kilobayes import host, parametrise, spec, tree
from kilobayes.card import Card, check_fingerprint, put, read_card
from kilobayes.checkpoint import read_tensors, write_atomically
from kilobayes.errors import KilobayesError
from kilobayes.files import write_json
from kilobayes.hub import first_line
from kilobayes.posteriors import ask
from kilobayes.random import generator
from kilobayes.types import Params, Posterior

__all__ = [
    "Card", "check_fingerprint", "put", "read_adapter", "read_card", "read_state", "save", "save_adapter",
]  # fmt: skip


def save(folder: Path, model: nn.Module, posterior: Posterior, state: Any, card: Card) -> dict[str, int]:
    """Write a run's model files; returns their sizes in bytes by part.

    Raises:
        KilobayesError: what is read back differs from what was written; nothing is lost in memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mean = posterior.mean(state)
    host.write(model, parametrise.restrict(host.method(model), mean, mean))
    save_adapter(folder, model)
    tensors = tree.flatten_state(state)
    write_atomically(folder / "posterior.safetensors", tensors)
    write_json(folder / "posterior.json", asdict(card))
    for name in (
        "posterior.safetensors",
        "adapter_model.safetensors",
    ):  # safetensors makes them the owner's alone
        shutil.copymode(folder / "posterior.json", folder / name)
    back, _ = read_tensors(folder / "posterior.safetensors")
    odd = tree.first_difference(
        back, {k: v.detach().cpu() for k, v in tensors.items()}
    ) or _reload_difference(folder, model)
    if odd:
        raise KilobayesError(
            f"{folder} does not read back as it was written",
            f"first difference: {odd}",
            "save again to another disk",
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
    part = folder / ".saving"  # one name, so that what a killed run left is written over
    shutil.rmtree(part, ignore_errors=True)
    try:
        model.save_pretrained(str(part), save_embedding_layers=False)  # type: ignore[operator]
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            with open(part / name, "rb") as file:
                os.fsync(file.fileno())
            os.replace(part / name, folder / name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _reload_difference(folder: Path, model: nn.Module) -> str:
    """The first leaf that a fresh load of the checkpoint gets wrong; others have lost heads here."""
    name = host.active(model)
    if model.peft_config[name].bias != "none":  # type: ignore[union-attr, index]
        return _written_difference(folder, model)  # PEFT takes no second adapter beside one with biases
    model.load_adapter(str(folder), adapter_name="reloaded")  # type: ignore[operator]
    theirs = {k: v.detach().clone() for k, v in host.read(model, "reloaded").items()}
    model.delete_adapter("reloaded")  # type: ignore[operator]
    model.set_adapter(name)  # type: ignore[operator]
    return tree.first_difference(theirs, {k: v.detach() for k, v in host.read(model, name).items()})


def _written_difference(folder: Path, model: nn.Module) -> str:
    """The first tensor of the checkpoint's file that is not the model's."""
    held, _ = read_tensors(folder / "adapter_model.safetensors")
    ours = get_peft_model_state_dict(model, save_embedding_layers=False)
    return tree.first_difference(held, {k: v.detach().cpu() for k, v in ours.items()})


def read_state(folder: Path, card: Card, leaves: Params) -> tuple[Posterior, Any]:
    """The posterior and its state.

    Args:
        leaves: those of the model that it is for ``(K, ...)``.

    Raises:
        KilobayesError: the file is missing, damaged, lacks a part that the posterior needs, or is of another
            model.
    """
    path = folder / "posterior.safetensors"
    posterior = spec.posterior(card.posterior)
    tensors, _ = read_tensors(path)
    remedy = "copy the run's folder whole"
    try:
        state = tree.unflatten_state(posterior, tensors)
        drawn = posterior.sample(
            state, posterior.support(state) or ask.members(posterior), generator(card.seed)
        )
        theirs, ours = ({k: v.shape[1:] for k, v in p.items()} for p in (tree.plain(drawn), leaves))
        odd = next((k for k in sorted(theirs | ours) if theirs.get(k) != ours.get(k)), "")
        if odd or tree.size(posterior.mean(state)) != ask.members(posterior):
            raise ValueError(f"its {odd or 'number of members'} does not fit")
        bad = next((k for k, v in tensors.items() if not v.isfinite().all()), None)
        if bad is not None:
            raise ValueError(f"{bad} holds what is no number")
    except KeyError as error:
        found = f"{error.args[0]} is missing"
        raise KilobayesError(f"{path} does not hold a {card.posterior}", found, remedy) from None
    except (ValueError, RuntimeError, IndexError, StopIteration) as error:
        found = first_line(error)
        raise KilobayesError(
            f"{path} does not hold a {card.posterior} of this model", found, remedy
        ) from None
    return posterior, state


def read_adapter(folder: Path, base: nn.Module, card: Card) -> nn.Module:
    """The base with the run's mean hosted on it.

    Raises:
        KilobayesError: PEFT's files are missing, damaged, or hold another adapter than the card says.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():  # PEFT would look for a pickle, then ask the hub
            raise KilobayesError(f"{folder / name} is missing", remedy="copy the run's folder whole")
    read_tensors(folder / "adapter_model.safetensors")
    try:
        model: nn.Module = PeftModel.from_pretrained(base, str(folder))  # type: ignore[arg-type]
        found, sites = repr(host.method(model)), {site.name for site in host.sites(model)}
    except Exception as error:  # many kinds: a damaged configuration meets two libraries
        raise KilobayesError(
            f"the adapter in {folder} cannot be loaded", first_line(error), "copy the run's folder whole"
        ) from None
    if found != repr(spec.adapter(card.adapter)) or sites != set(card.target_modules):
        raise KilobayesError(
            f"adapter_config.json and posterior.json in {folder} are of different runs",
            f"{found} and {card.adapter}, on {len(sites)} and {len(card.target_modules)} modules",
            "copy the run's folder whole",
        )
    return model
