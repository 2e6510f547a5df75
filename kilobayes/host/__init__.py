"""Hosting adapters on a Hugging Face model: the only package that touches PEFT's private names.

Importing it registers the method with PEFT, so ``PeftModel.from_pretrained`` reads kilobayes checkpoints.
"""

from __future__ import annotations

from torch import nn

from kilobayes.host.config import KilobayesConfig
from kilobayes.host.packing import packed
from kilobayes.host.pairing import check_rows, outer, read_token
from kilobayes.host.stack import (
    Built,
    active,
    base_of,
    build,
    detach,
    heads,
    install,
    layers,
    read,
    sites,
    without_adapter,
    write,
)
from kilobayes.host.tuner import KilobayesModel, initial, register
from kilobayes.types import Adapter

register()


def method(model: nn.Module, name: str | None = None) -> Adapter:
    """The active adapter's method, such as ``LoRA(r=8)``."""
    name = active(model, name)
    return next(iter(layers(model, name).values())).methods[name]


__all__ = [
    "Built",
    "KilobayesConfig",
    "KilobayesModel",
    "active",
    "base_of",
    "build",
    "check_rows",
    "detach",
    "heads",
    "initial",
    "install",
    "layers",
    "method",
    "outer",
    "packed",
    "read",
    "read_token",
    "register",
    "sites",
    "without_adapter",
    "write",
]
