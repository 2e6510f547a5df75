"""Into the host: a plain PEFT LoRA, trained elsewhere, becomes a stack of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from kilobayes.adapters import LoRA
from kilobayes.errors import KilobayesError
from kilobayes.host.config import KilobayesConfig
from kilobayes.host.layer import adaptable
from kilobayes.host.stack import write
from kilobayes.host.targets import keep_unpacked
from kilobayes.types import Params

# Ways to start that leave the base weights alone; the others (PiSSA, OLoRA, ...) take the start out of the
# base.
KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, eq=False)
class Plain:
    """A model's plain PEFT LoRA, as a stack of one may hold it.

    Attributes:
        layers: adapted layers by site.
        heads: the live leaves of trained linear layers.
        rest: other trained parameters of heads, live, by their path once hosted.
    """

    name: str
    config: LoraConfig
    layers: dict[str, Any]
    heads: Params
    rest: Params

    @property
    def method(self) -> LoRA:
        """Its rank is the largest there is."""
        rank = max(layer.r[self.name] for layer in self.layers.values())
        config = self.config
        return LoRA(rank, float(config.lora_alpha), config.use_rslora, float(config.lora_dropout))

    @torch.no_grad()
    def leaves(self) -> Params:
        """Copies ``(1, ...)`` of the weights as they are now, at least in float32.

        Where layers differ in rank, the smaller are filled up with zeros in both factors. Where they differ
        in scale, it goes into B.
        """
        method, theta = self.method, {}
        for path, layer in self.layers.items():
            a, b = (wide(factor[self.name].weight) for factor in (layer.lora_A, layer.lora_B))
            theta[f"{path}/A"] = nn.functional.pad(a, (0, 0, 0, method.r - len(a)))
            theta[f"{path}/B"] = nn.functional.pad(
                b * (layer.scaling[self.name] / method.scale), (0, method.r - len(a))
            )
        theta |= {key: wide(value) for key, value in self.heads.items()}
        return {key: value.detach().clone()[None] for key, value in theta.items()}


def wide(value: Tensor) -> Tensor:
    """In float32 where it was in half precision, whose averages would be lost in rounding."""
    return value.float() if value.element_size() < 4 else value


def plain(model: Any) -> Plain:
    """The plain LoRA that a PeftModel carries.

    Raises:
        KilobayesError: another method than plain LoRA, several adapters, or merged weights.
    """
    name, config = _plain(model)
    found: dict[str, Any] = {
        path: m for path, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)
    }
    for path, layer in found.items():
        _check_layer(path, layer, name)
    return Plain(name, config, found, *_heads(model, name))


@torch.no_grad()
def adopt(model: Any) -> PeftModel:
    """Turn a model with a trained PEFT LoRA into a hosted one, in place, with the same logits.

    Use what is returned. The adapter keeps its name; its weights and trained heads become a stack of one. The
    base is not changed. Ranks and scales that differ between layers are made one, see :meth:`Plain.leaves`;
    what is filled up stays zero under gradients.

    Raises:
        KilobayesError: another method than plain LoRA, several adapters, or merged weights; nothing is
            changed then.
    """
    found = plain(model)
    keep_unpacked(model)
    theta = found.leaves()
    rest = {path: value.detach().clone() for path, value in found.rest.items()}
    config, training = found.config, model.training
    for path, module in list(
        model.get_base_model().named_modules()
    ):  # PEFT leaves the trained heads in the base
        if isinstance(module, ModulesToSaveWrapper):
            parent, _, child = path.rpartition(".")
            setattr(model.get_base_model().get_submodule(parent), child, module.original_module)
    base = model.unload()
    kept = {key: getattr(config, key) for key in _KEPT}
    kept["bias"] = "kilobayes_only" if config.bias == "lora_only" else config.bias
    hosted: Any = get_peft_model(base, KilobayesConfig(adapter=found.method, **kept), adapter_name=found.name)
    write(hosted, theta)
    for path, value in rest.items():
        hosted.get_base_model().get_parameter(path).copy_(value)
    return hosted.train(training)


_KEPT = (
    "task_type", "inference_mode", "revision", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "modules_to_save",
)  # fmt: skip


def _plain(model: Any) -> tuple[str, LoraConfig]:
    if not isinstance(model, PeftModel):
        raise KilobayesError(
            "only a PeftModel can be adopted",
            f"found a {type(model).__name__}",
            "PeftModel.from_pretrained loads one",
        )
    if len(model.peft_config) != 1:
        raise KilobayesError(
            "one adapter is adopted at a time",
            f"the model carries {', '.join(model.peft_config)}",
            "model.delete_adapter(name) removes the others",
        )
    ((name, config),) = model.peft_config.items()
    kind = getattr(config.peft_type, "value", config.peft_type)
    if not isinstance(config, LoraConfig) or kind != "LORA":
        raise KilobayesError(
            "only LoRA can be adopted", f"the model carries {kind}", "train it again with kilobayes"
        )
    if config.init_lora_weights not in KEEPS_BASE:
        raise KilobayesError(
            "this LoRA changed the base weights when it started",
            f"init_lora_weights={config.init_lora_weights!r}",
            "save it with path_initial_model_for_weight_conversion, a plain LoRA then, and load that",
        )
    odd = [
        key
        for key in ("target_parameters", "trainable_token_indices", "layer_replication")
        if getattr(config, key, None)
    ]
    if config.use_dora or odd:
        raise KilobayesError(
            "only plain LoRA can be adopted",
            f"it uses {', '.join((['use_dora'] if config.use_dora else []) + odd)}",
            "merge it into the base, and train a LoRA on top",
        )
    return name, config


def _check_layer(path: str, layer: Any, name: str) -> None:
    if layer.merged:
        raise KilobayesError(
            "the LoRA is merged into the base", f"{path} is", "model.unmerge_adapter() first"
        )
    variant = getattr(layer, "lora_variant", {}).get(name)
    if variant is not None:
        raise KilobayesError("only plain LoRA can be adopted", f"{path} uses {type(variant).__name__}")
    if name not in layer.lora_A or not adaptable(layer.get_base_layer()) or layer.lora_bias.get(name):
        raise KilobayesError(
            "only LoRA on linear layers without a bias of its own can be adopted",
            f"{path} is a {type(layer.get_base_layer()).__name__}",
            "train it again without that layer",
        )


def _heads(model: Any, name: str) -> tuple[Params, Params]:
    """Trained heads: leaves of their linear layers, and the other parameters by their path once hosted."""
    leaves: Params = {}
    rest: Params = {}
    for path, wrapper in model.get_base_model().named_modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and name in wrapper.modules_to_save:
            for inner, module in wrapper.modules_to_save[name].named_modules():
                for leaf, value in module.named_parameters(recurse=False):
                    if type(module) is nn.Linear:
                        leaves[f"{'.'.join(p for p in (path, inner) if p)}/{leaf}"] = value
                    else:
                        parts = (path, "modules_to_save", name, inner, leaf)
                        rest[".".join(p for p in parts if p)] = value
    return leaves, rest
