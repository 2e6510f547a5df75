"""``thin``."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from kilobayes.commands import console
from kilobayes.errors import KilobayesError

UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1024, "mi": 1024**2, "gi": 1024**3}


def size(text: str) -> int:
    """Bytes: ``"400kB"`` (1000), ``"1.5 MiB"`` (1024 squared), ``"20000"``.

    Raises:
        KilobayesError: it is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmg]i?)?b?\s*", text.lower())
    if not found or not float(found[1]):
        raise KilobayesError(f"{text!r} is no size", remedy="as in --bytes 400kB")
    return int(float(found[1]) * UNITS[found[2] or ""])


def thin(folder: Path, limit: str, how: str, out: Path, model: str | None, *, as_json: bool) -> None:
    """Write a run of at most so many bytes beside the one it is made from, which stays as it is."""
    budget = size(limit)
    if (out / "posterior.json").exists():
        raise KilobayesError(f"{out} holds a run already", remedy="name another folder with --out")
    from kilobayes.commands.runs import check_writable

    check_writable(out / "posterior.json")
    from kilobayes import spec, store
    from kilobayes.files import write_json, write_text_atomically
    from kilobayes.random import generator
    from kilobayes.thin import stored
    from kilobayes.thin import thin as smaller
    from kilobayes.workflows.evaluate import command, versions
    from kilobayes.workflows.finetune import load
    from kilobayes.workflows.folder import stored_cost

    fitted = load(folder, model=model, device="cpu")
    checkpoint, own = folder / "adapter_model.safetensors", folder / "posterior.safetensors"
    before = checkpoint.stat().st_size + own.stat().st_size
    # PEFT's names are longer than ours, by as much in every run of this model; 8: files are aligned
    more = before - stored(fitted.posterior, fitted.state) + 8

    def size_of(posterior: Any, state: Any) -> int:
        return stored(posterior, state) + more

    gen = generator(fitted.card.seed, 9)
    posterior, state = smaller(fitted.posterior, fitted.state, budget, gen, how, size=size_of)
    card = replace(fitted.card, posterior=repr(posterior))
    sizes = store.save(out, fitted.model, posterior, state, card)
    after = sizes["checkpoint"] + sizes["posterior"]
    if (folder / "run.yaml").exists():  # the columns that it was trained on
        shutil.copyfile(folder / "run.yaml", out / "run.yaml")
    cost = stored_cost(folder) | {"stored_bytes": float(after)}
    write_json(out / "cost.json", cost | {"sizes": sizes})
    write_json(out / "env.json", versions() | {"command": command()})
    shown = spec.format(posterior)
    text = (
        f"# {shown}\n\nMade smaller by `{command()}`: {after:,} bytes of {before:,}.\n"
        "What it predicts is not measured yet: `kilobayes evaluate` does, on labelled rows.\n"
    )
    write_text_atomically(out / "README.md", text)
    console.say(f"{shown}: {console.human(after)} of {console.human(before)}")
    console.say(f"next:   kilobayes compare {folder} {out} --data ...")
    if as_json:
        console.result({"run": str(out), "posterior": shown, "bytes": after, "bytes_before": before})
