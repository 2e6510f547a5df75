"""Which modules an adapter may be put on: checked before anything in the model is touched."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import nn
from transformers.pytorch_utils import Conv1D

from kilobayes.errors import KilobayesError, nearest
from kilobayes.host.config import KilobayesConfig
from kilobayes.host.head import unstackable
from kilobayes.host.layer import adaptable

# The attention's queries and values, as PEFT chooses, of common architectures that its own list leaves out.
DEFAULTS = {
    "albert": ["query", "value"],
    "camembert": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "modernbert": ["Wqkv"],
    "mpnet": ["q", "v"],
    "phi3": ["qkv_proj"],
}


def linear_suffixes(model: nn.Module) -> list[str]:
    """The last parts of the names of a model's linear layers, the sorted set of them."""
    kinds = (nn.Linear, Conv1D, BaseTunerLayer)
    names = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, kinds)}
    return sorted(n for n in names if n not in ("base_layer", ""))


def natural(name: str) -> list[Any]:
    """A sort key that puts layer 10 after layer 9."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in name.split(".")]


def check(model: nn.Module, config: KilobayesConfig) -> None:
    """Everything that can be wrong with a configuration's choice of modules.

    Raises:
        KilobayesError: a listed target is not in the model; a target is not linear, belongs to a mixture of
            experts, is trained whole or shares its weight with another module; a head cannot be stacked.
    """
    if isinstance(config.target_modules, set | list):
        _check_names(model, sorted(config.target_modules))
    given = config.target_modules
    _maybe_include_all_linear_layers(config, model)  # in place
    if isinstance(given, str) and isinstance(config.target_modules, set):  # "all-linear" leaves heads alone
        config.target_modules -= {name for name in config.target_modules if _trained_whole(config, name)}
    _check_kinds(model, wanted := {n: m for n, m in _outermost(model).items() if _matches(config, n)})
    for name in filter(partial(_trained_whole, config), wanted):
        raise KilobayesError(
            f"{name} is in modules_to_save, which trains it whole",
            f"modules_to_save={sorted(config.modules_to_save or ())}",
            "take it out of target_modules",
        )
    if config.stack > 1:
        _check_heads(model, config)


def _trained_whole(config: KilobayesConfig, name: str) -> bool:
    """Whether PEFT puts the module, or one around it, under ``modules_to_save``.

    It does where a name ends so: "classifier" is DistilBERT's pre_classifier, too.
    """
    parts = name.split(".")
    around = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(path.endswith(saved) for path in around for saved in config.modules_to_save or ())


def _outermost(model: nn.Module) -> dict[str, nn.Module]:
    """Named modules, those inside an adapted layer left out."""
    found: dict[str, nn.Module] = {}
    inside: list[str] = []
    for name, module in model.named_modules():
        if name and not any(name.startswith(prefix) for prefix in inside):
            found[name] = module
            if isinstance(module, BaseTunerLayer):
                inside.append(f"{name}.")
    return found


def _matches(config: KilobayesConfig, name: str) -> bool:
    found = check_target_module_exists(config, name)
    return bool(found) and not isinstance(found, _ExcludedModule)


def _check_names(model: nn.Module, targets: list[str]) -> None:
    """Every entry of a list of targets must match; PEFT lets a half-wrong list pass."""
    names = [n for n, _ in model.named_modules()]
    for target in targets:
        if not any(n == target or n.endswith(f".{target}") for n in names):
            known = linear_suffixes(model)
            guess = nearest(target, known)
            raise KilobayesError(
                f"target module {target!r} is not in the model",
                f"its linear layers end in: {', '.join(known)}",
                f"did you mean {guess}?" if guess else "",
            )


def _check_kinds(model: nn.Module, targets: dict[str, nn.Module]) -> None:
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        if (weight := module._parameters.get("weight")) is not None:
            owners[id(weight)].append(name.removesuffix(".base_layer"))
    quantization = get_quantization_kwargs(model)
    for name, module in targets.items():
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if ".experts." in f".{name}.":
            raise KilobayesError(
                f"{name} belongs to a mixture of experts, which reorders tokens across the rows of a stack",
                remedy="target the attention layers only, such as q_proj and v_proj",
            )
        if not adaptable(base, **quantization):  # type: ignore[arg-type]
            raise KilobayesError(
                f"{name} cannot be adapted",
                f"it is a {type(base).__name__}, not a linear layer",
                f"take it out of target_modules; linear layers end in: {', '.join(linear_suffixes(model))}",
            )
        twins = [n for n in owners[id(getattr(base, "weight", None))] if n != name]
        if twins:
            raise KilobayesError(
                f"{name} cannot be adapted",
                f"it shares its weight with {', '.join(twins)}, which a merge would change too",
                "take it out of target_modules, or load the model with tie_word_embeddings=False",
            )


def _check_heads(model: nn.Module, config: KilobayesConfig) -> None:
    for wanted in config.modules_to_save or ():
        for name, module in model.named_modules():
            if name == wanted or name.endswith(f".{wanted}"):
                head = getattr(module, "original_module", module)
                for path, part in unstackable(head):
                    raise KilobayesError(
                        f"{'.'.join(p for p in (name, path) if p)} cannot be stacked",
                        f"it is a {type(part).__name__} in modules_to_save, with stack={config.stack}",
                        "leave it out of modules_to_save, or take stack=1",
                    )


def keep_unpacked(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    It does so at the first forward in evaluation mode. From then on gradients end at the weights, and they
    dequantise to other numbers, which merging would write; its own way back spoils weights wider than one
    quantisation block.

    Raises:
        KilobayesError: it has repacked some already; nothing is changed then.
    """
    linear = {n: m for n, m in model.named_modules() if hasattr(m, "support_avx512bf16_for_cpu")}
    for name, module in linear.items():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise KilobayesError(
                f"bitsandbytes has repacked the weight of {name} for inference",
                "a forward in evaluation mode came before",
                "load the model again and add the adapter first",
            )
    for module in linear.values():
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
