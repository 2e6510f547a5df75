"""The settings of a collaboration beside those of training; torch is not needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from kilobayes.errors import KilobayesError, nearest
from kilobayes.options import Options, from_mapping, typed

SHARES, WAYS = ("mean", "moments"), ("auto", "updates", "leaves")
SCHEMES = ("local", "fedavg", "oracle", "weights", "predictions", "validation")
# keys of a training run that have no meaning for several users at once
APART = {
    "data": "users names a folder or file for each",
    "test": "each user's data have a test split, or rows are held out",
    "epochs": "steps says how long all users train",
    "at_once": "all users are trained at once",
    "max_minutes": "stop with Ctrl-C, and go on with --resume",
    "ood": "kilobayes evaluate --ood takes a user's run",
    "packing": "users need rows of their own",
}


def _o(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help, "aliases": ()})


@dataclass(frozen=True)
class Together:
    """How users collaborate; every field is a flag (``--warmup-steps``) and a key of the YAML file.

    Raises:
        KilobayesError: a value of another kind or outside its range, or values that do not go together.
    """

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
    draws: int = _o(1, "Draws of shared moments that trust is measured with; 1: the mean.")
    classes: str | None = _o(None, "All classes, separated by commas; default those of all users.")
    kinds: str | None = _o(None, "Of the oracle: a word for each user in order, separated by commas.")

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, typed(f.name, getattr(self, f.name), hints[f.name]))
        for name, known in (("scheme", SCHEMES), ("share", SHARES), ("average", WAYS)):
            if (found := getattr(self, name)) not in known:
                guess = nearest(found, known)
                raise KilobayesError(
                    f"{name} {found!r:.40} is not known",
                    f"known: {', '.join(known)}",
                    f"did you mean {guess}?" if guess else "",
                )
        for name in ("steps", "every", "top", "positions", "draws"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise KilobayesError(f"{name} must be at least 1", f"found {number}")
        if self.warmup_steps < 0:
            raise KilobayesError("warmup_steps must be at least 0", f"found {self.warmup_steps}")
        if self.scheme == "predictions" and not self.reference:
            raise KilobayesError(
                "the scheme predictions needs shared rows to predict",
                "no reference",
                "as in reference: texts.jsonl, a file without labels; or scheme: validation",
            )
        if self.scheme == "oracle" and not self.kinds:
            raise KilobayesError(
                "the scheme oracle is told which users are of a kind", "no kinds", "as in kinds: a,a,b,b"
            )
        if self.draws > 1 and self.share != "moments":
            raise KilobayesError("draws need variances", "share: mean", "as in share: moments")

    def named(self) -> list[str] | None:
        """The classes, if they are named."""
        return [c.strip() for c in self.classes.split(",")] if self.classes else None


def fields() -> list[str]:
    """Names of the settings."""
    return [f.name for f in dataclasses.fields(Together)]


def read(values: Mapping[str, Any], where: str) -> tuple[Options, Together, Any]:
    """Settings of training and of the collaboration, and its users, from flat keys.

    Raises:
        KilobayesError: as :func:`split` and the settings themselves.
    """
    theirs, mine = split({k: v for k, v in values.items() if str(k) != "users"}, where)
    # unless asked for, users have a point: other posteriors are for those who take them
    return Options(**{"posterior": "Point()"} | theirs), Together(**mine), values.get("users") or ""


def split(values: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys of a flat mapping that are of training and those that are of the collaboration.

    Raises:
        KilobayesError: an unknown key, or one that has no meaning for several users.
    """
    own = {str(k).replace("-", "_"): v for k, v in values.items()}
    mine = {k: v for k, v in own.items() if k in fields() and v is not None}
    theirs = from_mapping({k: v for k, v in own.items() if k not in fields()}, where, also=fields())
    defaults = Options()
    for key, why in APART.items():
        if theirs.get(key, getattr(defaults, key)) != getattr(defaults, key):
            raise KilobayesError(f"{where} sets {key}, which users do not share", "", why)
    return theirs, mine
