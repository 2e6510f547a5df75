"""Out of the host: plain PEFT LoRA that loads without kilobayes, and merged models."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

from kilobayes.errors import KilobayesError
from kilobayes.host.config import KilobayesConfig
from kilobayes.host.layer import KilobayesLayer, require_single
from kilobayes.host.linear import require_linear
from kilobayes.host.rows import members
from kilobayes.host.stack import active, base_of, layers
from kilobayes.types import LowRank

PREFIX = "base_model.model."  # what PEFT puts before every name of the base


@torch.no_grad()
def export_lora(model: nn.Module, directory: str | Path, name: str | None = None) -> Path:
    """Write an adapter as plain PEFT LoRA, exactly: the factors are its own, no decomposition is involved.

    The scale is in B and alpha equals the rank, so that readers which know one alpha alone, as vLLM does,
    give the same numbers. Trained heads are written where PEFT expects ``modules_to_save``, GPT-2's layers as
    ``fan_in_fan_out``, and ranks that differ between layers as ``rank_pattern``.

    Args:
        model: a hosted model; what is installed on it is not what is written, its stored parameters are.
        directory: made if need be; ``adapter_config.json`` and ``adapter_model.safetensors`` in it are
            replaced.
        name: the adapter, by default the active one.

    Raises:
        KilobayesError: the adapter is a stack of more than one, or an operator of it is not linear or not of
            low rank.
    """
    name = active(model, name)
    hosted = layers(model, name)
    factors = {site: _factors(layer, name) for site, layer in hosted.items()}
    ranks = {site: f.A.shape[1] for site, f in factors.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    other = {site: rank for site, rank in ranks.items() if rank != common}
    ours: KilobayesConfig = model.peft_config[name]  # type: ignore[assignment, index]
    config = LoraConfig(
        r=common,
        lora_alpha=common,
        rank_pattern=other,
        alpha_pattern=dict(other),
        lora_dropout=float(getattr(ours.method, "dropout", 0.0)),
        fan_in_fan_out=any(layer.conv1d for layer in hosted.values()),
        bias="lora_only" if ours.bias == "kilobayes_only" else ours.bias,  # type: ignore[arg-type]
        inference_mode=True,
        **{key: getattr(ours, key) for key in _SHARED},
    )
    tensors = _heads(model, name) | _biases(model, ours.bias)
    for site, factor in factors.items():
        tensors[f"{PREFIX}{site}.lora_A.weight"] = factor.A[0]
        tensors[f"{PREFIX}{site}.lora_B.weight"] = factor.B[0]
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    save_file(plain, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    return folder


_SHARED = (
    "task_type", "base_model_name_or_path", "revision", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "modules_to_save",
)  # fmt: skip


def _factors(layer: KilobayesLayer, name: str) -> LowRank:
    operator = layer.operator(name)
    require_single(name, members(operator))
    require_linear(name, layer.path, operator)
    if not isinstance(operator, LowRank):
        raise KilobayesError(
            f"{layer.methods[name]!r} is not of low rank, so it is no LoRA",
            f"a {type(operator).__name__} at {layer.path}",
            "export_merged writes it into the model's weights",
        )
    return operator


def _heads(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Trained heads under the names of what they replace; stacked layers lose their leading axis."""
    out = {}
    for path, module in base_of(model).named_modules():
        if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
            plain = module.original_module.state_dict()
            for key, value in module.modules_to_save[name].state_dict().items():
                out[f"{PREFIX}{path}.{key}"] = value if value.dim() == plain[key].dim() else value[0]
    return out


def _biases(model: nn.Module, bias: str) -> dict[str, Tensor]:
    """Trained biases of the base, named as PEFT's LoRA names them."""
    if bias == "none":
        return {}
    state = {k: v for k, v in base_of(model).state_dict().items() if ".modules_to_save." not in k}
    return {
        f"{PREFIX}{k}": v
        for k, v in state.items()
        if k.endswith(".base_layer.bias") or (bias == "all" and k.endswith(".bias"))
    }


def export_merged(model: Any, directory: str | Path, name: str | None = None) -> Path:
    """Write the whole model with an adapter in its weights; the model in hand is untouched.

    A copy is merged, so memory holds the model twice. Quantised weights are merged as PEFT can, and rounded
    again.

    Raises:
        KilobayesError: the adapter is a stack of more than one, or not linear.
    """
    name = active(model, name)
    require_single(name, model.peft_config[name].stack)
    for layer in layers(model, name).values():
        require_linear(name, layer.path, layer.operator(name))
    copied = copy.deepcopy(model)
    copied.set_adapter(name)
    merged: Any = copied.merge_and_unload(safe_merge=True)
    folder = Path(directory)
    merged.save_pretrained(str(folder))
    return folder
