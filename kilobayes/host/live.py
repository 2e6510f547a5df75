"""A model while somebody else trains it: its leaves as they are now, and a hosted copy over the same base."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor

from kilobayes.errors import KilobayesError
from kilobayes.host.adopt import adopt, plain, wide
from kilobayes.host.config import KilobayesConfig
from kilobayes.host.stack import read
from kilobayes.types import Params


def live(model: nn.Module) -> Callable[[], Params]:
    """Reads copies ``(1, ...)`` of the leaves in training, plain LoRA's as :func:`adopt` would hold them.

    Raises:
        KilobayesError: neither plain LoRA nor a hosted stack of one, or weights spread over processes.
    """
    if not is_hosted(model):
        found = plain(model)
        weights = [f[found.name].weight for m in found.layers.values() for f in (m.lora_A, m.lora_B)]
        _check_whole([*weights, *found.heads.values()])
        return found.leaves
    leaves = read(model)
    stack = len(next(iter(leaves.values())))
    if stack != 1:
        raise KilobayesError(
            "a trainer's callback watches one adapter", f"a stack of {stack}", "host it with stack=1"
        )
    _check_whole(list(leaves.values()))
    return lambda: {key: wide(value.detach()).clone() for key, value in leaves.items()}


def twin(model: nn.Module) -> PeftModel:
    """A hosted model with copies of what is trained, over the very tensors of the frozen base.

    The model itself, its hooks and the random generators are left as they are.

    Raises:
        KilobayesError: as :func:`adopt`.
    """
    tensors = (*model.parameters(), *model.buffers())
    shared: dict[int, Any] = {id(tensor): tensor for tensor in tensors if not tensor.requires_grad}
    with torch.random.fork_rng():  # PEFT draws a start for the hosted leaves, which is then replaced
        copied: Any = copy.deepcopy(model, shared)
        copied = extract_model_from_parallel(copied, keep_fp32_wrapper=False)  # without accelerate's autocast
        return copied if is_hosted(model) else adopt(copied)


def is_hosted(model: nn.Module) -> bool:
    """Whether a PeftModel carries an adapter of kilobayes."""
    configs = getattr(model, "peft_config", {})
    return any(isinstance(config, KilobayesConfig) for config in configs.values())


def _check_whole(weights: list[torch.Tensor]) -> None:
    if any(isinstance(w, DTensor) or hasattr(w, "ds_id") or not w.numel() for w in weights):
        raise KilobayesError(
            "the adapter's weights are spread over processes",
            "FSDP, tensor parallelism or DeepSpeed's ZeRO-3",
            "train with data parallelism, or ZeRO-1 or -2: adapters are small",
        )
