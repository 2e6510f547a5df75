"""Where a trainer stands, and where it keeps its checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from kilobayes.errors import KilobayesError

# beside each of the trainer's checkpoints
STATE = "kilobayes.safetensors"
ADAPTER = "kilobayes-adapter.safetensors"


def extent(loader: Any, args: Any, state: Any) -> tuple[int, int]:
    """Optimiser steps of an epoch, and rows; of a stream without a length, those of all training."""
    accumulated = args.gradient_accumulation_steps
    try:
        return max(math.ceil(len(loader) / accumulated), 1), len(loader.dataset)
    except TypeError:
        batch = args.per_device_train_batch_size * accumulated * args.world_size
        return state.max_steps, state.max_steps * batch


def kept(args: Any, state: Any, name: str) -> Path:
    """A file beside the trainer's checkpoint that training goes on from.

    Raises:
        KilobayesError: it is not there.
    """
    named = getattr(args, "resume_from_checkpoint", None)
    usual = Path(args.output_dir) / f"checkpoint-{state.global_step}"
    for folder in ([Path(named)] if isinstance(named, str) else []) + [usual]:
        if (folder / name).is_file():
            return folder / name
    raise KilobayesError(
        f"training goes on at step {state.global_step}, but nothing was collected until there",
        f"there is no {usual / name}",
        "resume from a checkpoint in output_dir that was written with this callback",
    )
