"""Compact parametrisations of the update, one paper in one file; ``__all__`` is the registry."""

from kilobayes.adapters.blora import BLoRA
from kilobayes.adapters.hydralora import HydraLoRA
from kilobayes.adapters.lora import LoRA
from kilobayes.adapters.loraxs import LoRAXS
from kilobayes.adapters.mora import MoRA
from kilobayes.adapters.nola import NOLA
from kilobayes.adapters.olora import OLoRA
from kilobayes.adapters.roselora import RoseLoRA
from kilobayes.adapters.vblora import VBLoRA
from kilobayes.adapters.vera import VeRA

__all__ = ["NOLA", "BLoRA", "HydraLoRA", "LoRA", "LoRAXS", "MoRA", "OLoRA", "RoseLoRA", "VBLoRA", "VeRA"]
