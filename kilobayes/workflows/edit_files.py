"""A folder of edits: their adapter in compact files, what each edit did, and how to take the last ones back.

======================= =============================================================================
edits.json              the base, the adapter, the settings, and the edits in order.
edits.jsonl             the scores of each edit, one a line.
metrics.json            their means.
states/                 a stack, compact: of sequential edits the adapter after each of them, of single
                        ones the adapter of each.
adapter/                of sequential edits, the adapter with all of them.
======================= =============================================================================

Undoing takes members off the end of the stack, so what is left is bit for bit what it was; the base is not
needed. Nothing is ever merged here.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from kilobayes import host, tree
from kilobayes.checkpoint import read_tensors, write_atomically
from kilobayes.errors import KilobayesError
from kilobayes.files import write_json, write_text_atomically
from kilobayes.host.compact import FILE, export_compact, load_compact
from kilobayes.models import fingerprint, load_causal
from kilobayes.types import Params

CARD, CONFIG, SCORES, MEANS = "edits.json", "adapter_config.json", "edits.jsonl", "metrics.json"
OLD = "metrics-before-undo.json"


def read_card(folder: Path) -> dict[str, Any]:
    """What ``edits.json`` holds.

    Raises:
        KilobayesError: there is none, or it is damaged.
    """
    path = folder / CARD
    if not path.is_file():
        raise KilobayesError(
            f"{folder} holds no edits", f"it has no {CARD}", "name the --out of kilobayes edit"
        )
    try:
        card = dict(json.loads(path.read_text(encoding="utf-8")))
        if not isinstance(card["edits"], list) or card["mode"] not in ("sequential", "single"):
            raise ValueError(f"mode {card['mode']!r}")
    except (ValueError, TypeError, KeyError) as error:
        raise KilobayesError(f"{path} is damaged", str(error)[:200], "copy the folder whole") from None
    return card


def save(folder: Path, model: nn.Module, theta: Params, card: dict[str, Any]) -> dict[str, float]:
    """Write the stack of states ``(n, ...)``, the adapter in force and the card; returns bytes by part."""
    folder.mkdir(parents=True, exist_ok=True)
    host.write(model, theta)
    sizes = export_compact(model, folder / "states")
    host.write(model, tree.member(theta, -1))
    put_in_force(folder, card["mode"], len(card["edits"]))
    write_json(folder / CARD, card)
    return sizes


def put_in_force(folder: Path, mode: str, count: int) -> None:
    """Make ``adapter/`` the last of ``count`` states, of sequential edits; none is left of no edits."""
    if mode == "single":
        return
    if count:
        cut(folder / "states", folder / "adapter", slice(count - 1, count))
    else:
        shutil.rmtree(folder / "adapter", ignore_errors=True)


def cut(source: Path, target: Path, members: slice) -> None:
    """Some members of a compact stack, as a compact file of their own; source and target may be the same."""
    tensors, about = read_tensors(source / FILE)
    kept = {k: v if k == "check" else v[members] for k, v in tensors.items()}
    config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    config["stack"] = next(len(v) for k, v in kept.items() if k != "check")
    target.mkdir(parents=True, exist_ok=True)
    write_atomically(target / FILE, kept, about)
    write_json(target / CONFIG, config)


def undo(folder: Path, last: int = 1) -> dict[str, Any]:
    """Take the last edits back; returns the card with those that are left.

    Of single edits, each of which has an adapter of its own, the last ones are dropped. Means that count
    edits that are gone are put aside: ``metrics.json`` becomes ``metrics-before-undo.json``.

    Raises:
        KilobayesError: there are not so many edits, or the folder holds none.
    """
    card = read_card(folder)
    count = len(card["edits"])
    if not 1 <= last <= count:
        raise KilobayesError(
            f"{last} edits cannot be undone", f"{folder} holds {count}", f"--last 1 to {count}"
        )
    left = count - last
    card["edits"] = card["edits"][:left]
    if left:
        cut(folder / "states", folder / "states", slice(0, left))
    else:
        shutil.rmtree(folder / "states", ignore_errors=True)
    put_in_force(folder, card["mode"], left)
    write_json(folder / CARD, card)
    if (folder / MEANS).exists():
        os.replace(folder / MEANS, folder / OLD)
    lines = (
        (folder / SCORES).read_text(encoding="utf-8").splitlines(keepends=True)
        if (folder / SCORES).exists()
        else []
    )
    write_text_atomically(folder / SCORES, "".join(lines[:left]))
    write_text_atomically(folder / "README.md", readme(card, None))
    return card


def load(
    folder: str | Path, number: int | None = None, *, model: str | None = None, device: str = "cpu"
) -> Any:
    """The base with edits on it, and its tokenizer: ``(hosted model, tokenizer)``.

    Args:
        number: of sequential edits, the model after so many of them (default all; 0 is the base); of single
            ones the model with that edit alone, from 1 (needed).
        model: where the base is now.

    Raises:
        KilobayesError: no such edit; another base than was edited.
    """
    folder = Path(folder)
    card = read_card(folder)
    count = len(card["edits"])
    least = 1 if card["mode"] == "single" else 0
    if number is None and card["mode"] == "sequential":
        number = count
    if number is None or not least <= number <= count:
        raise KilobayesError(
            "which edit is meant" if number is None else f"there is no edit {number}",
            f"edits {least} to {count}",
        )
    base = load_causal(model or card["base"], dtype=card["dtype"], device=device)
    if fingerprint(base.model) != card["fingerprint"]:
        raise KilobayesError(
            f"{base.name} is not the model that was edited", "its weights differ", "name the base with model="
        )
    if not number:
        return base.model, base.tokenizer
    hosted = load_compact(base.model, folder / "states").eval()
    host.write(hosted, tree.member({k: v.detach().clone() for k, v in host.read(hosted).items()}, number - 1))
    return hosted, base.tokenizer


def readme(card: dict[str, Any], means: dict[str, Any] | None) -> str:
    """What the folder holds, for a person."""
    count, single = len(card["edits"]), card["mode"] == "single"
    how = "each alone, from the unedited model" if single else "one after the other"
    lines = [f"# {count} edits of {card['base']}", "", f"{card['adapter']}, {how}.", ""]
    if means is None:
        lines += [
            "Edits were undone since the scores were measured; measure again with `kilobayes edit`.",
            "",
        ]
    else:
        lines += ["| | teacher forcing | free generation |", "|---|---:|---:|"]
        for name in ("success", "generality", "portability", "locality", "kept"):
            lines.append(f"| {name} | {shown(means[f'{name}_teacher'])} | {shown(means[f'{name}_free'])} |")
        lines += [
            "",
            f"Fluency {shown(means['fluency'], 0)}, before {shown(means['fluency_before'], 0)}.",
            "",
        ]
    lines += [f"{i}. {e['prompt']} -> {e['target']}" for i, e in enumerate(card["edits"][:20], 1)]
    lines += ["", "..."] if count > 20 else []
    name = "" if single else "`kilobayes generate FOLDER/adapter --prompt ...` writes with the edits; "
    lines += ["", f"{name}`kilobayes edit --undo FOLDER` takes the last edit back."]
    return "\n".join(lines) + "\n"


def shown(value: float | None, digits: int = 3) -> str:
    """A score for a table."""
    return "-" if value is None else f"{value:.{digits}f}"
