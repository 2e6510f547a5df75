"""Users who fine-tune for themselves and average with whom it pays: trust, and the mixing of adapters."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = [
    "among",
    "cosines_of",
    "distances",
    "fedavg",
    "local",
    "oracle",
    "prediction_trust",
    "softmax",
    "validation_trust",
    "weight_trust",
]


def __getattr__(name: str) -> Any:
    # when it is first used: settings, which the command line reads, need no torch
    if name in __all__:
        return getattr(importlib.import_module("kilobayes.collaboration.trust"), name)
    raise AttributeError(f"module 'kilobayes.collaboration' has no attribute {name!r}")
