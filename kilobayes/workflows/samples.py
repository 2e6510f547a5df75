"""A posterior as so many plain LoRA adapters, for servers that know several adapters but no posterior."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from kilobayes import __version__, host, tree
from kilobayes.card import read_card
from kilobayes.errors import KilobayesError
from kilobayes.files import write_json
from kilobayes.language import Allowed, LanguageModel
from kilobayes.posteriors import ask
from kilobayes.random import generator
from kilobayes.serve.manifest import FORMAT, MANIFEST


def export_samples(
    run: Path, out: Path, count: int | None = None, *, name: str = "", model: str | None = None
) -> dict[str, Any]:
    """Write draws as PEFT LoRA folders ``NAME_0``, ``NAME_1``, ... and ``manifest.json`` beside them.

    Args:
        count: draws; None takes the run's own number. A finite posterior gives all it has, whatever is asked.
        name: of the folders, by default the run's.
        model: where the base is now, if not where it was.

    Returns:
        The manifest.

    Raises:
        KilobayesError: adapters that are no LoRA; a posterior without draws of weights, or with masks drawn
            for every token.
    """
    card = read_card(run, "")
    hosted, posterior, state, classes = _loaded(run, card.task, model)
    if any(getattr(part, "linearised", False) for part in ask.chain(posterior)):
        raise KilobayesError(
            "a linearised posterior has no draws of weights", repr(posterior), "fit it with linearised=False"
        )
    number = ask.count(posterior, state, count or card.samples)
    drawn = ask.draws(posterior, state, Allowed(hosted), number, generator(card.seed, 7))  # type: ignore[arg-type]
    if any("~" in key for key in drawn):
        raise KilobayesError(
            "masks of tokens are no weights", repr(posterior), 'MCDropout(noise="row") has weights'
        )
    name = name or run.resolve().name
    samples = []
    for at in range(number):
        host.write(hosted, tree.member(drawn, at))
        folder = host.export_lora(hosted, out / f"{name}_{at}")
        digest = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
        samples.append({"name": folder.name, "weight": 1.0 / number, "sha256": digest})
    found = {
        "format": FORMAT,
        "kilobayes": __version__,
        "name": name,
        "task": card.task,
        "classes": classes,
        "base": card.base,
        "fingerprint": card.fingerprint,
        "adapter": card.adapter,
        "posterior": card.posterior,
        "seed": card.seed,
        "transformed": transforms(posterior, state, max(len(classes), 2)),
        "samples": samples,
    }
    write_json(out / MANIFEST, found)
    return found


def _loaded(run: Path, task: str, model: str | None) -> tuple[Any, Any, Any, list[str]]:
    if task == "lm":
        found = LanguageModel.load(run, model=model, device="cpu")
        return found.model, found.posterior, found.state, []
    from kilobayes.workflows.finetune import load

    fitted = load(run, model=model, device="cpu")
    return fitted.model, fitted.posterior, fitted.state, list(fitted.card.classes)


def transforms(posterior: Any, state: Any, classes: int) -> bool:
    """Whether the posterior changes scores, as a temperature does, which no adapter can hold."""
    probe = torch.linspace(-1.0, 2.0, classes).reshape(1, 1, classes)
    return not torch.equal(ask.transform(posterior, state, probe), probe)
