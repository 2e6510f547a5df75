"""A run's calibration rows as the model sees them, kept beside the posterior: ``calibration.safetensors``."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from kilobayes.checkpoint import read_tensors, write_atomically
from kilobayes.errors import KilobayesError
from kilobayes.metrics.conformal import Calibration

FILE = "calibration.safetensors"


def write(folder: Path, calibration: Calibration | None) -> None:
    """Keep it beside ``run.yaml``, ``4 C + 8`` bytes a row; where there is none, none is left there."""
    if calibration is None:
        (folder / FILE).unlink(missing_ok=True)
        return
    found = {"probs": torch.from_numpy(calibration.probs), "labels": torch.from_numpy(calibration.labels)}
    write_atomically(folder / FILE, found)
    shutil.copymode(folder / "run.yaml", folder / FILE)  # safetensors makes it the owner's alone


def read(folder: Path, classes: int) -> Calibration | None:
    """What :func:`write` kept; None where it kept nothing.

    Raises:
        KilobayesError: the file is damaged, or of another run.
    """
    if not (folder / FILE).exists():
        return None
    tensors, _ = read_tensors(folder / FILE)
    try:
        calibration = Calibration(tensors["probs"].float().numpy(), tensors["labels"].long().numpy())
        if calibration.probs.shape[1] != classes:
            raise ValueError(f"{calibration.probs.shape[1]} classes, the run has {classes}")
    except (KeyError, ValueError) as error:
        raise KilobayesError(
            f"{folder / FILE} is damaged", str(error), "copy the run's folder whole"
        ) from None
    return calibration
