"""Compact parametrisations of the update, one paper in one file; ``__all__`` is the registry."""

from kilobayes.adapters.lora import LoRA
from kilobayes.adapters.nola import NOLA
from kilobayes.adapters.vblora import VBLoRA
from kilobayes.adapters.vera import VeRA

__all__ = ["NOLA", "LoRA", "VBLoRA", "VeRA"]
