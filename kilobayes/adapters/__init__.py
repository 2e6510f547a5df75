"""Compact parametrisations of the update, one paper in one file; ``__all__`` is the registry."""

from kilobayes.adapters.lora import LoRA

__all__ = ["LoRA"]
