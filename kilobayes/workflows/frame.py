"""What runs of every task have in common: settings on disk, a log, the files, what they warn of."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from kilobayes import store
from kilobayes.files import write_json
from kilobayes.options import Options
from kilobayes.run_yaml import write_yaml
from kilobayes.train import Trained
from kilobayes.workflows.evaluate import command, versions
from kilobayes.workflows.folder import CHECKPOINT, Log


def begin(folder: Path, options: Options) -> None:
    """The folder with ``run.yaml`` and ``env.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_yaml(folder / "run.yaml", options)
    write_json(folder / "env.json", versions() | {"command": command()})


def fitted_in(folder: Path, options: Options, watch: Any, fit: Callable[[Log], Any]) -> tuple[Any, list[str]]:
    """What ``fit`` gives, its steps logged in the folder, and what a reader must know of how it went.

    Args:
        watch: called after each optimiser step.
        fit: trains; it calls the log after each step.
    """
    log = Log(folder / "log.jsonl", options.resume, watch)
    resumed = ["The run was resumed: seconds and memory are those since."]
    resumed = resumed if options.resume and (folder / CHECKPOINT).exists() else []
    try:
        with own_warnings() as warned:
            fitted = fit(log)
    finally:
        log.close()
    if fitted.trained is not None:
        log.whole(fitted.trained.losses.tolist())
    return fitted, [*resumed, *dict.fromkeys(warned)]


def save(folder: Path, fitted: Any) -> tuple[Any, dict[str, int]]:
    """Write the model's files and ``cost.json``; the same with its stored bytes, and the sizes by part."""
    sizes = store.save(folder, fitted.model, fitted.posterior, fitted.state, fitted.card)
    stored = float(sizes["checkpoint"] + sizes["posterior"])
    fitted = replace(fitted, cost=fitted.cost | {"stored_bytes": stored})
    write_json(folder / "cost.json", {k: round(v, 3) for k, v in fitted.cost.items()} | {"sizes": sizes})
    return fitted, sizes


def went(trained: Trained | None) -> list[str]:
    """What a person should know about how training ended."""
    out = []
    if trained is not None and trained.diverged:
        out.append(f"Members {trained.diverged} diverged and were left out; try a lower --lr.")
    if trained is not None and trained.stopped:
        out.append("Training stopped at --max-minutes, before its schedule ended.")
    return out


@contextmanager
def own_warnings() -> Iterator[list[str]]:
    """Collects what kilobayes itself warns of, for the report; the warnings of others go where they went."""
    told: list[str] = []
    package = str(Path(store.__file__).parent)
    with warnings.catch_warnings(record=True) as seen:
        warnings.filterwarnings("always", category=UserWarning, module=r"kilobayes\b")
        try:
            yield told
        finally:
            others = [w for w in seen if not w.filename.startswith(package)]
            told += [f"{w.message}." for w in seen if w.filename.startswith(package)]
    for w in others:
        warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
