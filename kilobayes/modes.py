"""Training and evaluation mode of the frozen base, put on for a while and taken back module by module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Within it, every module is in evaluation mode; afterwards each is in the mode it was in.

    ``model.train(model.training)`` would not do: a freshly made PeftModel is in training mode around a base
    that is not.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def recomputing(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Within it, a transformers model recomputes its blocks in the backward pass, if wanted.

    transformers renamed the switch in 5.23, and takes the old name away in 6.
    """
    if not wanted:
        yield
        return
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    name = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
    getattr(base, f"{name}_checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(base, f"{name}_checkpointing_disable")()


@contextmanager
def checkpointing(model: nn.Module) -> Iterator[None]:
    """Within it, layers set to gradient checkpointing obey although the model is in evaluation mode.

    transformers recomputes a layer only in training mode, and some layers read the same switch for their own
    dropout; so the switch is on where it is asked whether to recompute, and off inside what is recomputed.
    """
    chosen = [
        m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing
    ]
    modes = [layer.training for layer in chosen]
    functions: list[Any] = [layer._gradient_checkpointing_func for layer in chosen]

    def guarded(layer: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(forward: Callable[..., Any], *args: Any) -> Any:
            def inside(*args: Any) -> Any:
                layer.training = False
                try:
                    return forward(*args)
                finally:
                    layer.training = True

            return function(inside, *args)

        return run

    try:
        for layer, function in zip(chosen, functions):
            layer.training = True
            layer._gradient_checkpointing_func = guarded(layer, function)  # type: ignore[assignment]
        yield
    finally:
        for layer, mode, function in zip(chosen, modes, functions):
            layer.training = mode
            layer._gradient_checkpointing_func = function
