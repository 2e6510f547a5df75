"""VB-LoRA as PEFT saves it, read as ours: full logits or the compact format, in any precision."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import VBLoRAConfig
from torch import Tensor

from kilobayes.adapters.vblora import NEVER, VBLoRA
from kilobayes.errors import KilobayesError
from kilobayes.host.export import PREFIX
from kilobayes.types import Params

BANK = "base_model.vblora_vector_bank"
INDICES, WEIGHTS = "_topk_indices", "_topk_weights"


@torch.no_grad()
def from_peft(tensors: Mapping[str, Tensor], config: VBLoRAConfig) -> tuple[VBLoRA, Params]:
    """The adapter and the leaves ``(1, ...)`` of a PEFT checkpoint of VB-LoRA, trained heads included.

    The compact format (``save_only_topk_weights``) holds the first k - 1 of the k weights of each piece, the
    largest first. The last is what they lack to 1, or just above 0 where rounding leaves nothing; PEFT takes
    the logarithm of what is left as it is, which may be NaN. Leaves are float32 whatever the file's dtype, so
    that bfloat16 files can be read, which PEFT fails on. Compact leaves choose the same vectors for good.

    Put them on a base with ``get_peft_model(base, KilobayesConfig(adapter=..., target_modules=...,
    modules_to_save=..., task_type=...))``, the last three as in ``config``, and :func:`kilobayes.host.write`.

    Args:
        tensors: the contents of ``adapter_model.safetensors``.
        config: of the same folder: ``PeftConfig.from_pretrained(folder)``. Its dropout concerns training
            alone, and is left out.

    Raises:
        KilobayesError: biases of the base are among what was trained, or the file is incomplete.
    """
    if config.bias != "none":
        raise KilobayesError(
            "biases of the base are no part of our VB-LoRA",
            f"bias={config.bias!r}",
            "train it with bias='none'",
        )
    if BANK not in tensors:
        raise KilobayesError("the file has no vector bank", f"no tensor is called {BANK}")
    bank = tensors[BANK]
    adapter = VBLoRA(r=config.r, h=len(bank), b=bank.shape[1], k=config.topk)
    theta: Params = {"*/bank": bank}
    for name, value in tensors.items():
        path, _, leaf = name.removeprefix(PREFIX).rpartition(".")
        if name == BANK or leaf.endswith(WEIGHTS):
            continue
        if leaf.endswith(INDICES):
            theta[f"{path}/{_leaf(leaf.removesuffix(INDICES))}"] = _logits(
                value, _weights(tensors, name), adapter.h
            )
        else:
            theta[f"{path}/{_leaf(leaf)}"] = value
    return adapter, {key: value.detach().float().clone()[None] for key, value in sorted(theta.items())}


def _leaf(name: str) -> str:
    """Our name of a leaf: ``vblora_logits_A`` is ``logits_A``, those of heads stay as they are."""
    return name.removeprefix("vblora_")


def _weights(tensors: Mapping[str, Tensor], indices: str) -> Tensor:
    name = indices.removesuffix(INDICES) + WEIGHTS
    if name not in tensors:
        raise KilobayesError("the file lacks weights of the vectors that it chooses", f"no tensor {name}")
    return tensors[name]


def _logits(indices: Tensor, weights: Tensor, h: int) -> Tensor:
    """Logits ``(..., h)`` of the largest k - 1 weights ``(..., k - 1)`` of the vectors ``(..., k)``."""
    first = weights.float()
    least = torch.finfo(torch.float32).tiny
    weights = torch.cat([first, 1.0 - first.sum(-1, keepdim=True)], dim=-1).clamp(min=least)
    empty = weights.new_full((*weights.shape[:-1], h), NEVER)
    return empty.scatter(-1, indices.long(), weights.log())
