"""Runs under ``torchrun``, saved by every process; see tests/test_processes.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import save_file

from kilobayes import train, tree
from kilobayes.adapters import LoRA
from kilobayes.checkpoint import Checkpoint
from kilobayes.posteriors import SWA, Ensemble, MCDropout, Point, Temperature
from kilobayes.testing.tiny import TinyRows, nll, tiny_model, tiny_start

torch.set_num_threads(1)


def run(
    posterior: Any, *, save: Checkpoint | None = None, watch: Any = None, **changes: Any
) -> train.Trained:
    """Batches of 7, the last of an epoch one row: processes have different shares, some none."""
    model, rows = tiny_model(LoRA(r=2, dropout=0.2)), TinyRows.make(22, seed=2)
    settings = train.Settings(lr=0.01, epochs=2, batch_size=7, seeds=(4, 5), accumulate=2, **changes)
    return train.fit(model, rows, nll, posterior, tiny_start(model, [4, 5]), settings, save=save, watch=watch)


def prior() -> Any:
    return Temperature(Ensemble(Point(prior_precision=5.0), members=2))


def masked() -> Any:
    return Ensemble(MCDropout(p=0.4, noise="token"), members=2)


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    done = run(prior(), save=Checkpoint(folder / f"checkpoint-{rank}", {}))
    process = PartialState()
    now = SimpleNamespace(time=0.0)
    train.time = SimpleNamespace(monotonic=lambda: now.time)  # type: ignore[assignment]

    def watch(progress: Any, loss: Any) -> None:
        now.time = 100.0 if progress.step == 3 and process.process_index == process.num_processes - 1 else 0.0

    late = run(SWA(start=0.1, snapshots=9), watch=watch, max_seconds=10.0)
    tensors = {f"done|{k}": v for k, v in tree.flatten_state(done.state).items()}
    tensors |= {f"masked|{k}": v for k, v in tree.flatten_state(run(masked()).state).items()}
    tensors |= {f"late|{k}": v for k, v in tree.flatten_state(late.state).items()}
    tensors |= {
        "losses": done.losses,
        "late-losses": late.losses,
        "processes": torch.tensor(process.num_processes),
    }
    save_file(tensors, folder / f"process-{process.process_index}.safetensors")
    process.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
