"""The tuner: puts adapted layers and stacked heads into a model, the way PEFT expects of its methods."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import ModulesToSaveWrapper
from peft.utils.peft_types import register_peft_method
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import nn

from kilobayes import parametrise
from kilobayes.errors import KilobayesError
from kilobayes.host import deberta, targets
from kilobayes.host.config import NAME, KilobayesConfig
from kilobayes.host.head import StackedLinear, stack_head
from kilobayes.host.layer import SHARED, KilobayesLayer, require_single
from kilobayes.host.linear import require_linear
from kilobayes.random import generator
from kilobayes.tree import concatenate, map_params
from kilobayes.types import Adapter, Params, Site


def initial(
    adapter: Adapter, sites: list[Site], seeds: list[int], constants: Params | None = None
) -> tuple[Params, Params]:
    """A stack's start: member s draws from the generator of ``seeds[s]``, as it would alone.

    Args:
        constants: the adapter's constants on these sites, if they are at hand.
    """
    constants = parametrise.freeze(adapter, sites) if constants is None else constants
    members = [adapter.init(sites, constants, 1, generator(seed)) for seed in seeds]
    return concatenate(members), constants


class KilobayesModel(BaseTuner):
    """PEFT's tuner for :class:`KilobayesConfig`."""

    prefix = "kilobayes_"
    tuner_layer_cls = KilobayesLayer
    target_module_mapping: Any = targets.DEFAULTS | TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        kind = model_config.get("model_type")
        if peft_config.target_modules is None and kind not in self.target_module_mapping:
            raise KilobayesError(
                f"no default target modules are known for the architecture {kind!r}",
                f"its linear layers end in: {', '.join(targets.linear_suffixes(self.model))}",
                'name some of these as target modules, or take "all-linear"',
            )
        config: Any = super()._prepare_adapter_config(peft_config, model_config)
        targets.check(self.model, config)
        return config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        targets.keep_unpacked(model)

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
        if not isinstance(target, KilobayesLayer):
            layer = KilobayesLayer(target, current_key, **get_quantization_kwargs(self.model))
            self._replace_module(parent, target_name, layer, target)
            deberta.attach(parent)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """As PEFT's, then fill the layers: an adapter is initialised for all its sites at once."""
        merged = next((m for m in model.modules() if isinstance(m, KilobayesLayer) and m.merged), None)
        if merged is not None:  # what starts from the base's weights would start from the merged ones
            found = f"{', '.join(merged.merged_adapters)} in {merged.path}"
            raise KilobayesError("an adapter is merged into the base", found, "model.unmerge_adapter() first")
        before, self.targeted_module_names = self.targeted_module_names, []
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            names = self.targeted_module_names  # this adapter's alone
        finally:
            self.targeted_module_names = sorted({*before, *self.targeted_module_names}, key=targets.natural)
        config: Any = self.peft_config[adapter_name]
        self._fill(model, adapter_name, config, names, low_cpu_mem_usage)

    def _fill(
        self, model: nn.Module, name: str, config: KilobayesConfig, keys: list[str], meta: bool
    ) -> None:
        layers: dict[str, Any] = {key: model.get_submodule(key) for key in keys}
        seeds = [config.seed + member for member in range(config.stack)]
        theta, constants = initial(config.method, [layer.site for layer in layers.values()], seeds)
        if not config.init_weights:
            noise = generator(config.seed, 1)
            theta = map_params(lambda t: t + 0.05 * torch.randn(t.shape, generator=noise), theta)
        if meta:
            theta = map_params(lambda t: t.to("meta"), theta)
        owner = next(iter(layers.values()))
        shared = {SHARED + k.removeprefix("*/"): v for k, v in theta.items() if k.startswith("*/")}
        common = {SHARED + k.removeprefix("*/"): v for k, v in constants.items() if k.startswith("*/")}
        trainable = name in self.active_adapters and not config.inference_mode
        for key, layer in layers.items():
            own = {k.removeprefix(f"{key}/"): v for k, v in theta.items() if k.startswith(f"{key}/")}
            own |= shared if layer is owner else {}
            frozen = {k.removeprefix(f"{key}/"): v for k, v in constants.items() if k.startswith(f"{key}/")}
            frozen |= common if layer is owner else {}
            layer.fill(name, config.method, own, frozen, trainable)
            if shared or common:
                layer.shared[name] = owner
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
                stack_head(module.modules_to_save, name, config.stack)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Leaves and heads in float32, whatever the base; without ``autocast_adapter_dtype`` as the base."""
        for module in self.model.modules():
            if isinstance(module, KilobayesLayer) and adapter_name in module.kilobayes_leaves:
                _, dtype = module._get_base_layer_device_and_dtype(module.get_base_layer())
                part = module.kilobayes_leaves[adapter_name]
            elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
                dtype = next(module.original_module.parameters()).dtype
                part = module.modules_to_save[adapter_name]
            else:
                continue
            if autocast_adapter_dtype:
                for stacked in part.modules():
                    if isinstance(stacked, StackedLinear | nn.ParameterDict):
                        stacked.float()
            elif dtype is not None and dtype.is_floating_point:
                part.to(dtype)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # PEFT's own reads child.weight when it unloads, which composite classifier heads do not have.
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT drops adapter_names without a word where a method does not know it.
        if kwargs.get("adapter_names") is not None:
            raise KilobayesError(
                "rows of different adapters in one batch are not told apart by name",
                "adapter_names=...",
                "host them as one stack, KilobayesConfig(stack=S): block s of the rows goes to member s",
            )
        yield

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        deberta.release(model)
        return model

    def _require_mergeable(self, names: list[str] | None) -> None:
        for name in names or self.active_adapters:
            config: Any = self.peft_config[name]
            require_single(name, config.stack)
            # before a layer is touched: a model that is merged in part is neither
            hosted = (m for m in self.model.modules() if isinstance(m, KilobayesLayer))
            for layer in (m for m in hosted if name in m.kilobayes_leaves):
                require_linear(name, layer.path, layer.operator(name))

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._require_mergeable(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """A plain model with the updates in its weights and the trained heads in place.

        Raises:
            KilobayesError: an adapter is a stack of more than one.
        """
        self._require_mergeable(adapter_names)
        model = super().merge_and_unload(progressbar, safe_merge, adapter_names)
        for path, module in list(model.named_modules()):
            if isinstance(module, StackedLinear):
                parent, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent), child, module.single())
        return model

    def unload(self) -> nn.Module:
        """The original model, heads included (PEFT's own methods leave the trained head in it)."""
        for path, module in list(self.model.named_modules()):
            if isinstance(module, ModulesToSaveWrapper):
                parent, _, child = path.rpartition(".")
                setattr(self.model.get_submodule(parent), child, module.original_module)
        return super().unload()


def register() -> None:
    """Make PEFT know the method; importing kilobayes.host does it once."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if NAME not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=NAME.lower(), config_cls=KilobayesConfig, model_cls=KilobayesModel)
