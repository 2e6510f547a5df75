"""Run a model's frozen linear layers on prepacked weights, for as long as a context lasts."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kilobayes.errors import KilobayesError
from kilobayes.host.kernels import FrozenWeight, PackedWeight, available, eager, linear, low_rank_linear, pack

__all__ = [
    "FrozenWeight",
    "PackedWeight",
    "available",
    "frozen_weights",
    "low_rank_linear",
    "packed",
    "packed_weights",
    "worthwhile",
]


class _PackedForward:
    """Stands in for a module's ``forward``: packed where that serves, the module's own code everywhere
    else."""

    def __init__(self, module: nn.Module, packed: PackedWeight) -> None:
        self.module, self.packed = module, packed
        self.original = type(module).forward.__get__(module)

    def usable(self) -> PackedWeight | None:
        """The packed weight, unless the module's has changed since or a context asks for torch's own code."""
        held = self.module._parameters
        fresh = self.packed.current(held.get("weight"), held.get("bias"))
        return self.packed if fresh and eager("cpu") else None

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.usable()
        if weight is None or not weight.serves(x) or weight.small(x):
            return self.original(x)
        return linear(x, weight)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A copy of the model made inside the context is a plain model.
        copy = memo.get(id(self.module), self.module)
        return type(copy).forward.__get__(copy)


def _layout(module: nn.Module) -> bool | None:
    """Whether the weight is stored ``(d_in, d_out)``; None for anything but a plain linear layer."""
    forward = type(module).forward
    if forward is nn.Linear.forward:
        return False
    transformers = sys.modules.get("transformers.pytorch_utils")
    if transformers is not None and forward is transformers.Conv1D.forward:
        return True
    return None


def _plain(module: nn.Module) -> bool:
    """Whether the module is a linear layer that runs its class's own code on frozen ordinary tensors."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None or "forward" in module.__dict__ or _layout(module) is None:
        return False
    parts = [weight] if bias is None else [weight, bias]
    return (
        all(type(part) is nn.Parameter and not part.requires_grad for part in parts)
        and all(part.device == weight.device and part.dtype == weight.dtype for part in parts)
        and weight.layout is torch.strided
        and weight.numel() > 0
    )


def _packable(module: nn.Module, dtype: torch.dtype) -> bool:
    weight: Any = module._parameters.get("weight")
    return _plain(module) and weight.is_cpu and weight.dtype == dtype and not weight.is_inference()


@contextlib.contextmanager
def packed(model: nn.Module, dtype: torch.dtype | None = None, backward: bool = True) -> Iterator[nn.Module]:
    """Within the context, every frozen plain linear layer of ``model`` runs on prepacked weights.

    That is each ``nn.Linear`` and transformers ``Conv1D`` on the CPU whose weight and bias need no gradient,
    the base layers inside adapter layers included; quantised layers, tensor subclasses and layers whose
    ``forward`` was already replaced are left alone. Where packing does not pay (see ``worthwhile``) nothing
    happens at all. Weights are never written to: saving and ``state_dict`` are the same inside. A layer whose
    weight is swapped, unfrozen or changed inside the context goes back to its own code, save for in-place
    changes through ``.data``, which nothing can see.

    Args:
        dtype: the weights to pack, float32 unless given. bfloat16 is there for passes over few rows (a decode
            step); a training step gains about a hundredth, since those products are fast already.
        backward: also pack the transposes, so that gradients reach the layers below; a second copy in memory.
            Without it a layer whose input needs a gradient runs its own code.

    Yields:
        The same model.
    """
    replaced: list[nn.Module] = []
    dtype = torch.float32 if dtype is None else dtype
    try:
        with torch.inference_mode(False):
            for module in model.modules() if worthwhile(dtype) else ():
                if _packable(module, dtype):
                    held: dict[str, Any] = module._parameters
                    record = pack(
                        held["weight"], held.get("bias"), backward, inputs_first=bool(_layout(module))
                    )
                    module.__dict__["forward"] = _PackedForward(module, record)
                    replaced.append(module)
        yield model
    finally:
        for module in replaced:
            if isinstance(module.__dict__.get("forward"), _PackedForward):
                del module.__dict__["forward"]


def packed_weights(module: nn.Module) -> PackedWeight | None:
    """The packed weight of ``module`` if it may be used now (in the context, unchanged, no autocast)."""
    forward = module.__dict__.get("forward")
    return forward.usable() if isinstance(forward, _PackedForward) else None


def frozen_weights(module: nn.Module) -> FrozenWeight | None:
    """What ``low_rank_linear`` needs of a base layer: its packed weight, else its own on whatever device.

    None where calling the module is not the same as multiplying by a frozen weight (hooks, a replaced
    ``forward``, a quantised or trained weight) or where torch's own code must run (autocast, ``torch.func``,
    a compiler).
    """
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    if any(hooks):
        return None
    if isinstance(module.__dict__.get("forward"), _PackedForward):
        return packed_weights(module)
    held: dict[str, Any] = module._parameters
    if not _plain(module) or not eager(held["weight"].device.type):
        return None
    return FrozenWeight((held["weight"].mT if _layout(module) else held["weight"]).detach(), held.get("bias"))


def worthwhile(dtype: torch.dtype = torch.float32) -> bool:
    """Whether packed products of this dtype pay on this machine; the same answer throughout a process.

    bfloat16 always does where oneDNN has it: the plain product is oneDNN's too and reorders the weight at
    every call. float32 is timed once, in about 15 ms: packed must take under 0.8 of MKL's time. MKL that
    stays on AVX2 (AMD) is beaten clearly (0.65 and less), MKL on AVX-512 (Intel) hardly (0.97): so far apart
    that runs on one machine agree, rounding included.
    ``KILOBAYES_PACK=1`` packs wherever the operators work; ``KILOBAYES_PACK=0`` never.

    Raises:
        KilobayesError: ``KILOBAYES_PACK`` is something else.
    """
    forced = os.environ.get("KILOBAYES_PACK", "")
    if forced not in ("", "0", "1"):
        raise KilobayesError(
            "KILOBAYES_PACK must be 0 or 1", f"found {forced!r}", "unset it to decide by timing"
        )
    if forced == "0" or not available(dtype):
        return False
    return forced == "1" or dtype is not torch.float32 or _time_ratio() < 0.8


@functools.cache
def _time_ratio(rows: int = 128, d_in: int = 384, d_out: int = 1024, rounds: int = 7) -> float:
    """Packed over plain, best CPU time of each; no random numbers are drawn."""
    with torch.inference_mode(False), torch.no_grad():
        weight = torch.linspace(-1.0, 1.0, d_out * d_in).view(d_out, d_in)
        x = torch.linspace(-1.0, 1.0, rows * d_in).view(rows, d_in)
        record = pack(weight, backward=False)
        best = {"plain": float("inf"), "packed": float("inf")}
        for _ in range(rounds):
            for name in best:
                start = time.thread_time()
                nn.functional.linear(x, weight) if name == "plain" else record.multiply(x)
                best[name] = min(best[name], time.thread_time() - start)
    return best["packed"] / best["plain"]
