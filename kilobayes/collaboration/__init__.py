"""Users who fine-tune for themselves and average with whom it pays: trust, and the mixing of adapters."""

from __future__ import annotations

from kilobayes.collaboration.trust import (
    among,
    cosines_of,
    distances,
    fedavg,
    local,
    oracle,
    prediction_trust,
    softmax,
    validation_trust,
    weight_trust,
)

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
