"""Trains in child processes that kill themselves without warning at chosen moments, resumes, and compares.

Prints one JSON object: scenario -> "" where the resumed run equals an uninterrupted one bit for bit, else
what differs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kilobayes import checkpoint, spec, train, tree
from kilobayes.adapters import LoRA
from kilobayes.posteriors import ask
from kilobayes.testing.tiny import TinyRows, nll, tiny_model, tiny_start

torch.set_num_threads(1)
POSTERIORS = [
    "Point(prior_precision=2.0)",
    "SWAG(rank=3, start=0.3, snapshots=5)",
    "Ensemble(SWAG(rank=2, start=0.25, by_epoch=True), members=2)",
]


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Rows(TinyRows):
    """Rows that kill the process while the n-th batch is made."""

    deadly = 0

    def batch(self, rows: torch.Tensor) -> Any:
        self.deadly -= 1
        if not self.deadly:
            die()
        return super().batch(rows)


class Deadly(Rows):
    deadly = 6


def nth(n: int, do: Callable[..., Any], otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """Calls ``do`` the n-th time, ``otherwise`` the other times."""
    count = 0

    def call(*args: Any, **keywords: Any) -> Any:
        nonlocal count
        count += 1
        return (do if count == n else otherwise)(*args, **keywords)

    return call


def torn(tensors: Any, path: Path, metadata: Any) -> None:
    """Half of the file, then death."""
    save(tensors, path, metadata)
    os.truncate(path, os.path.getsize(path) // 2)
    die()


def rename_and_die(source: Path, target: Path) -> None:
    rename(source, target)
    die()


save, rename, flush = checkpoint.save_file, os.replace, os.fsync


def run(
    text: str, path: Path | None, resume: bool = False, deadly: bool = False, watch: Any = None
) -> train.Trained:
    posterior = spec.posterior(text)
    seeds = list(range(4, 4 + ask.members(posterior)))
    model = tiny_model(LoRA(r=2, dropout=0.2))
    made = TinyRows.make(21, seed=2)
    rows = (Deadly if deadly else Rows)(made.ids, made.labels)
    settings = train.Settings(lr=0.01, epochs=3, batch_size=8, seeds=tuple(seeds), accumulate=2)
    keep = (
        None
        if path is None
        else checkpoint.Checkpoint(path, {"posterior": text}, resume=resume, seconds=-1.0)
    )
    return train.fit(model, rows, nll, posterior, tiny_start(model, seeds), settings, save=keep, watch=watch)


def crash(moment: str, text: str, path: Path) -> None:
    if moment == "after a step":
        run(text, path, watch=nth(5, die, lambda *_: None))
    elif moment == "within a step":
        run(text, path, deadly=True)
    elif moment == "half of a checkpoint written":
        checkpoint.save_file = nth(4, torn, save)
        run(text, path)
    elif moment == "before a checkpoint is on disk":
        os.fsync = nth(7, die, flush)
        run(text, path)
    elif moment == "before a checkpoint is renamed":
        os.replace = nth(1, die, rename)
        run(text, path)
    elif moment == "after a checkpoint is renamed":
        os.replace = nth(8, rename_and_die, rename)
        run(text, path)
    elif moment == "after the last":
        os.replace = nth(9, rename_and_die, rename)
        run(text, path)


MOMENTS = [
    "after a step",
    "within a step",
    "half of a checkpoint written",
    "before a checkpoint is on disk",
    "before a checkpoint is renamed",
    "after a checkpoint is renamed",
    "after the last",
]


def main(folder: Path) -> None:
    found = {}
    for text in POSTERIORS:
        whole = run(text, None)
        for moment in MOMENTS:
            path = folder / f"{len(found)}" / "latest.safetensors"
            child = os.fork()
            if not child:
                crash(moment, text, path)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
                found[f"{text} {moment}"] = f"was not killed: status {status}"
                continue
            again = run(text, path, resume=True)
            odd = tree.first_difference(tree.flatten_state(again.state), tree.flatten_state(whole.state))
            odd = odd or ("" if torch.equal(again.losses, whole.losses) else "losses")
            left = sorted(p.name for p in path.parent.iterdir())
            found[f"{text} {moment}"] = odd or ("" if left == [path.name] else f"left behind: {left}")
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
