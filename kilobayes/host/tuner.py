"""The tuner: puts adapted layers and stacked heads into a model, the way PEFT expects of its methods."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import ModulesToSaveWrapper
from peft.utils.peft_types import register_peft_method
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import nn
from transformers.pytorch_utils import Conv1D

from kilobayes.errors import KilobayesError, nearest
from kilobayes.host.config import NAME, KilobayesConfig
from kilobayes.host.head import StackedLinear
from kilobayes.host.layer import SHARED, KilobayesLayer
from kilobayes.random import generator
from kilobayes.tree import concatenate, leaves_of, map_params
from kilobayes.types import Adapter, Params, Site


def initial(adapter: Adapter, sites: list[Site], seeds: list[int]) -> tuple[Params, Params]:
    """A stack's start: member s draws from the generator of ``seeds[s]``, as it would alone."""
    members, constants = [], {}
    for seed in seeds:
        theta, constants = adapter.init(sites, 1, generator(seed))
        members.append(theta)
    return concatenate(members), constants


class KilobayesModel(BaseTuner):
    """PEFT's tuner for :class:`KilobayesConfig`."""

    prefix = "kilobayes_"
    tuner_layer_cls = KilobayesLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        if peft_config.target_modules is None and model_config.get("model_type") not in self.target_module_mapping:
            raise KilobayesError(
                f"no default target modules are known for the architecture {model_config.get('model_type')!r}",
                f"its linear layers end in: {', '.join(linear_suffixes(self.model))}",
                'name some, as in --target-modules query,value, or take "all-linear"',
            )
        config = super()._prepare_adapter_config(peft_config, model_config)
        _check_targets(self.model, config.target_modules)
        return config

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if ".experts." in f".{current_key}.":
            raise KilobayesError(
                f"{current_key} belongs to a mixture of experts, which reorders tokens across the rows of a stack",
                remedy="target the attention layers only, as in --target-modules q_proj,v_proj",
            )
        if not isinstance(target, KilobayesLayer):
            layer = KilobayesLayer(target, current_key, **get_quantization_kwargs(self.model))
            self._replace_module(parent, target_name, layer, target)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """As PEFT's, then fill the layers: an adapter is initialised for all its sites at once."""
        before = set(self.targeted_module_names)
        self.targeted_module_names = []  # PEFT appends to it; what it holds afterwards is this adapter's
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        names = self.targeted_module_names
        self.targeted_module_names = sorted(before | set(names), key=_natural)
        self._fill(model, adapter_name, self.peft_config[adapter_name], names, low_cpu_mem_usage)
        self.set_adapter(self.active_adapters, inference_mode=self.peft_config[adapter_name].inference_mode)
        self._mark_only_adapters_as_trainable(model)

    def _fill(self, model: nn.Module, name: str, config: KilobayesConfig, keys: list[str], meta: bool) -> None:
        layers = {key: model.get_submodule(key) for key in keys}
        seeds = [config.seed + member for member in range(config.stack)]
        sites = [layer.site for layer in layers.values()]  # type: ignore[union-attr]
        theta, constants = initial(config.method, sites, seeds)
        if not config.init_weights:
            noise = generator(config.seed, 1)
            theta = map_params(lambda t: t + 0.05 * torch.randn(t.shape, generator=noise), theta)
        if meta:
            theta = map_params(lambda t: t.to("meta"), theta)
        owner: Any = next(iter(layers.values()))
        shared = {SHARED + k.removeprefix("*/"): v for k, v in theta.items() if k.startswith("*/")}
        for key, layer in layers.items():
            own = {k.removeprefix(f"{key}/"): v for k, v in theta.items() if k.startswith(f"{key}/")}
            own |= shared if layer is owner else {}
            layer.fill(name, config.method, own, leaves_of(constants, key))  # type: ignore[operator]
            if shared:
                layer.shared[name] = owner  # type: ignore[union-attr, index]
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
                _stack_head(module.modules_to_save, name, config.stack)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own reads child.weight when it unloads, which composite classifier heads do not have.
        setattr(parent, child_name, new_module)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for name, module in list(model.named_modules()):
            if isinstance(module, StackedLinear):
                if module.weight.shape[0] != 1:
                    raise ValueError(f"{name} is a stack of {module.weight.shape[0]} heads, which do not merge into one")
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.single())
        return model

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> Any:
        for name in kwargs.get("adapter_names") or self.active_adapters:
            if self.peft_config[name].stack != 1:
                raise ValueError(
                    f"adapter {name!r} is a stack of {self.peft_config[name].stack}, which has no single merged model; "
                    "write one member first: kilobayes.write(model, kilobayes.tree.member(kilobayes.read(model), 0))"
                )
        return super().merge_and_unload(*args, **kwargs)


def _stack_head(parent: nn.Module, name: str, stack: int) -> None:
    """Replace every linear layer of a trained head by a stack of copies.

    Raises:
        KilobayesError: the head has trained parts that are not linear, and the stack is larger than one.
    """
    head = parent[name]  # type: ignore[index]
    trainable = any(p.requires_grad for p in head.parameters())
    if type(head) is nn.Linear:
        parent[name] = StackedLinear.repeat(head, stack)  # type: ignore[index]
    else:
        for path, module in list(head.named_modules()):
            if type(module) is nn.Linear:
                owner, _, child = path.rpartition(".")
                setattr(head.get_submodule(owner), child, StackedLinear.repeat(module, stack))
            elif stack > 1 and not isinstance(module, StackedLinear) and any(True for _ in module.parameters(False)):
                raise KilobayesError(
                    f"a {type(module).__name__} in a trained head cannot be stacked",
                    f"stack={stack}, modules_to_save holds it",
                    "leave it out of modules_to_save, or take stack=1",
                )
    parent[name].requires_grad_(trainable)  # type: ignore[index]


def linear_suffixes(model: nn.Module) -> list[str]:
    """The last parts of the names of a model's linear layers, the sorted set of them."""
    kinds = (nn.Linear, Conv1D, BaseTunerLayer)
    names = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, kinds)}
    return sorted(n for n in names if n not in ("base_layer", ""))


def _check_targets(model: nn.Module, targets: Any) -> None:
    """Every entry of a list of targets must match; PEFT lets a half-wrong list pass."""
    if isinstance(targets, str) or not targets:
        return
    names = [n for n, _ in model.named_modules()]
    for target in sorted(targets):
        if not any(n == target or n.endswith(f".{target}") for n in names):
            known = linear_suffixes(model)
            guess = nearest(target, known)
            raise KilobayesError(
                f"target module {target!r} is not in the model",
                f"its linear layers end in: {', '.join(known)}",
                f"did you mean --target-modules {guess}?" if guess else "",
            )


def _natural(name: str) -> list[Any]:
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in name.split(".")]


def register() -> None:
    """Make PEFT know the method; importing kilobayes.host does it once."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if NAME not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=NAME.lower(), config_cls=KilobayesConfig, model_cls=KilobayesModel)
