"""Hosting adapters on a Hugging Face model: the only package that touches PEFT's private names.

Importing it registers the method with PEFT, so ``PeftModel.from_pretrained`` reads kilobayes checkpoints.
"""

from __future__ import annotations

from kilobayes.host.adopt import adopt
from kilobayes.host.config import KilobayesConfig
from kilobayes.host.export import export_lora, export_merged
from kilobayes.host.packing import packed
from kilobayes.host.pairing import check_rows, outer, read_token
from kilobayes.host.stack import (
    Built,
    active,
    base_of,
    build,
    constants,
    detach,
    heads,
    install,
    layers,
    method,
    read,
    sites,
    uncovered,
    without_adapter,
    write,
)
from kilobayes.host.tuner import KilobayesModel, initial, register
from kilobayes.host.unpad import real_tokens

register()


__all__ = [
    "Built",
    "KilobayesConfig",
    "KilobayesModel",
    "active",
    "adopt",
    "base_of",
    "build",
    "check_rows",
    "constants",
    "detach",
    "export_lora",
    "export_merged",
    "heads",
    "initial",
    "install",
    "layers",
    "method",
    "outer",
    "packed",
    "read",
    "read_token",
    "real_tokens",
    "register",
    "sites",
    "uncovered",
    "without_adapter",
    "write",
]
