"""A run's folder before, while and after it trains; torch is not needed to look at it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kilobayes.errors import KilobayesError
from kilobayes.options import Options
from kilobayes.run_yaml import read_yaml

CHECKPOINT = Path("checkpoints") / "latest.safetensors"


def default_folder(options: Options) -> Path:
    """``runs/DATA-POSTERIOR-SEED``, of letters, digits and dashes."""
    data = Path(options.data).name.split(".")[0] or "data"
    words = re.sub(r"[^A-Za-z0-9]+", "-", f"{data}-{options.posterior}-{options.seed}").strip("-").lower()
    return Path("runs") / words


def place(options: Options) -> Options:
    """The options with the run's folder named, which is checked: nothing is written yet.

    Raises:
        KilobayesError: the folder cannot be written, or holds a run that this one would write over; with
            ``resume``, it holds a run of other settings, or one that is finished.
    """
    folder = Path(options.out) if options.out else default_folder(options)
    options = replace(options, out=str(folder))
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise KilobayesError(f"{folder} cannot be a folder", f"{there} is a file", "name another with --out")
    if not os.access(there, os.W_OK | os.X_OK):
        raise KilobayesError(
            f"{folder} cannot be written", f"no permission in {there}", "name another with --out"
        )
    if options.resume:
        _check_same(folder, options)
        return options
    if (folder / "posterior.json").exists() or (folder / "checkpoints").exists():
        raise KilobayesError(
            f"{folder} holds a run already",
            "it is finished" if finished(folder) else "it is unfinished",
            "name another folder with --out"
            if finished(folder)
            else f"kilobayes train --resume --out {folder} goes on with it; or name another --out",
        )
    return options


def _check_same(folder: Path, options: Options) -> None:
    if not (folder / "run.yaml").exists():
        return
    ours, theirs = options.identity(), Options(**read_yaml(folder / "run.yaml")).identity()
    odd = [k for k in ours if ours[k] != theirs[k]]
    if odd:
        raise KilobayesError(
            f"{folder} holds a run of other settings",
            "; ".join(f"{k}: {theirs[k]} there, {ours[k]} here" for k in odd[:3]),
            "resume with the same settings, or name another --out",
        )
    if finished(folder):
        raise KilobayesError(
            f"{folder} is finished, so there is nothing to resume",
            f"{steps(folder)[0]} optimiser steps, and its report",
            f"kilobayes evaluate {folder} --data ..., or train again into another --out",
        )


def resumed(out: str) -> dict[str, Any]:
    """Settings of the run in a folder, so that ``--resume --out RUN`` alone goes on with it."""
    path = Path(out) / "run.yaml"
    return read_yaml(path) if path.is_file() else {}


def steps(folder: Path) -> tuple[int, int]:
    """Optimiser steps that are logged, and those planned; ``(0, 0)`` before the first."""
    try:
        last = json.loads((folder / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        return int(last["step"]), int(last["steps"])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return 0, 0


def finished(folder: Path) -> bool:
    """Whether a run was trained to its end and written whole; its README comes last."""
    done, planned = steps(folder)
    return (folder / "README.md").exists() and done == planned > 0


def stored_cost(folder: Path) -> dict[str, float]:
    """The cost that a run recorded, for its later evaluations; empty if it recorded none."""
    try:
        found = json.loads((folder / "cost.json").read_text(encoding="utf-8"))
        return {k: float(v) for k, v in found.items() if isinstance(v, int | float)}
    except (OSError, ValueError, AttributeError):
        return {}


class Log:
    """``log.jsonl``: a line for each optimiser step as it is taken, and whole again at the end.

    A killed run may lose its last lines, and a resumed one repeats some; so the file is written anew from the
    losses that the checkpoint carries.

    Args:
        watch: told of every step too.
    """

    def __init__(self, path: Path, resume: bool, watch: Callable[[Any, Any], None] | None = None) -> None:
        self.path, self.watch, self.planned = path, watch, 0
        self.file = open(path, "a" if resume else "w", encoding="utf-8", buffering=1)  # noqa: SIM115

    def __call__(self, progress: Any, loss: Any) -> None:
        """A step's line, as the training loop tells of it."""
        self.planned = progress.steps
        self.add(progress.step, progress.steps, loss.tolist())
        if self.watch is not None:
            self.watch(progress, loss)

    def add(self, step: int, steps: int, losses: Sequence[float]) -> None:
        self.file.write(json.dumps(_line(step, steps, losses)) + "\n")

    def close(self) -> None:
        self.file.close()

    def whole(self, losses: Sequence[Sequence[float]]) -> None:
        """Write every step's line, from all losses ``(steps taken, members)``."""
        from kilobayes.files import write_lines

        self.close()
        steps = self.planned or len(losses)
        write_lines(self.path, [_line(i, steps, row) for i, row in enumerate(losses, 1)])


def _line(step: int, steps: int, losses: Sequence[float]) -> dict[str, Any]:
    # a member that diverged has no loss, which JSON says as null
    return {"step": step, "steps": steps, "loss": [round(v, 6) if abs(v) < 1e30 else None for v in losses]}
