"""The settings of a collaboration beside those of training; torch is not needed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _o(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help, "aliases": ()})


@dataclass(frozen=True)
class Together:
    """How users collaborate; every field is a flag (``--warmup-steps``) and a key of the YAML file."""

    users: str = _o("", "A folder with a folder or a file of data for each user.")
    scheme: str = _o("validation", "Trust: local, fedavg, oracle, weights, predictions or validation.")
    steps: int = _o(500, "Optimiser steps of every user.")
    warmup_steps: int = _o(100, "Steps that everyone takes alone before the first exchange.")
    every: int = _o(25, "Steps between exchanges.")
    temperature: float | None = _o(None, "Of trust; default the scheme's own: 0.5, 0.05 or 0.1.")
    top: int | None = _o(None, "Average with so many users at most, oneself among them.")
    average: str = _o("auto", "What is averaged: updates, leaves, or auto: leaves where it is the same.")
    reference: str = _o("", "Shared rows without labels, for the scheme predictions.")
    positions: int = _o(256, "Reference rows, or token positions, that are predicted, at most.")
    share: str = _o("mean", "What is exchanged: mean, or moments: with variances, of SWAG(rank=0).")
    draws: int = _o(1, "Draws of the posterior that trust is measured with; 1: its mean.")
    classes: str | None = _o(None, "All classes, separated by commas; default those of all users.")
    kinds: str | None = _o(None, "Of the oracle: a word for each user in order, separated by commas.")
