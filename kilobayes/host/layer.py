"""The adapted layer: a frozen base layer as a black box, plus the operator that the adapter builds."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kilobayes.host.head import blocks
from kilobayes.host.packing import low_rank_linear, packed_weights
from kilobayes.types import Adapter, LowRank, Operator, Params, Site, delta, map_tensors

SHARED = "shared_"  # leaves shared by all sites live in the first site's layer under this prefix


class KilobayesLayer(nn.Module, BaseTunerLayer):
    """Holds the leaves of each adapter of one site, ``(S, ...)``, and calls the adapter's pure ``build``."""

    adapter_layer_names = ("kilobayes_leaves",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, site: str, **quantization: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.kilobayes_leaves = nn.ModuleDict()
        self.methods: dict[str, Adapter] = {}
        self.constants: dict[str, Params] = {}
        self.shared: dict[str, KilobayesLayer] = {}  # where an adapter's shared leaves live, by adapter name
        self.installed: Operator | None = None
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        base = self.get_base_layer()
        self.conv1d = isinstance(base, Conv1D)
        with warnings.catch_warnings():  # PEFT warns of layer types that it does not know; we raise below
            warnings.simplefilter("ignore")
            d_in, d_out = _get_in_out_features(base)
        if not isinstance(d_in, int) or not isinstance(d_out, int) or isinstance(base, nn.Embedding):
            raise TypeError(f"{site} is a {type(base).__name__}, not a linear layer; take it out of target_modules")
        self.quantization_backend = resolve_quantization_backend(base, **quantization)
        self.site = Site(site, int(d_in), int(d_out), self.dequantised)

    def dequantised(self) -> Tensor:
        """The base weight ``(d_out, d_in)`` in its own dtype; a view where it is stored plainly."""
        weight = self.get_base_weight()
        return weight.T if self.conv1d else weight

    def fill(self, name: str, method: Adapter, leaves: Params, constants: Params) -> None:
        """Give the layer an adapter's leaves; they take the device of the base, and keep their dtype."""
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        values = nn.ParameterDict({k: nn.Parameter(v.to(device)) for k, v in leaves.items()})
        self.methods[name] = method
        self.constants[name] = {k: v.to(device) for k, v in constants.items()}
        self.kilobayes_leaves[name] = values
        self.set_adapter(self.active_adapters)

    def operator(self, name: str) -> Operator:
        """The operator of an adapter, built from its leaves."""
        own: Any = self.kilobayes_leaves[name]
        leaves = {k: v for k, v in own.items() if not k.startswith(SHARED)}
        if name in self.shared:
            owner: Any = self.shared[name].kilobayes_leaves[name]
            leaves |= {k.removeprefix(SHARED): v for k, v in owner.items() if k.startswith(SHARED)}
        method = self.methods[name]
        if self.training and getattr(method, "dropout", 0.0) > 0.0:
            leaves = method.drop(leaves, _Default())  # type: ignore[attr-defined]
        return method.build(leaves, self.constants[name], self.site)

    def operators(self) -> list[Operator]:
        """What the forward adds to the base: the installed operator, or those of the active adapters."""
        if self.installed is not None:
            return [self.installed]
        return [self.operator(name) for name in self.active_adapters if name in self.kilobayes_leaves]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("rows of different adapters in one batch: stack them instead, KilobayesConfig(stack=S)")
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        active = self.operators()
        if len(active) == 1 and isinstance(active[0], LowRank) and not args and not kwargs:
            packed = packed_weights(self.base_layer)
            if packed is not None and x.dtype == active[0].A.dtype:
                blocks(x[:, :0], active[0].A.shape[0])  # the row check, on no data
                return low_rank_linear(x, packed, active[0].A, active[0].B)
        y = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            y = self.quantization_backend.maybe_clone_base_result(y)
        for operator in active:
            y = add(y, x, operator)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the update to the base weight.

        Raises:
            ValueError: a stack of more than one, an operator that is not linear, or a NaN under ``safe_merge``.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.kilobayes_leaves:
                weight = self.get_base_weight().clone()
                weight += self._update(name, weight)
                if safe_merge and not torch.isfinite(weight).all():
                    raise ValueError(f"NaN or infinity in the merged weight of {self.site.name}, adapter {name!r}")
                self.set_base_weight(weight)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            weight = self.get_base_weight().clone()
            self.set_base_weight(weight - self._update(name, weight))

    def _update(self, name: str, like: Tensor) -> Tensor:
        """The update in the base's storage layout and dtype; computed in the leaves' own precision."""
        training, self.training = self.training, False
        update = delta(self.operator(name), self.site.d_in)
        self.training = training
        if update.shape[0] != 1:
            raise ValueError(
                f"adapter {name!r} is a stack of {update.shape[0]}, which has no single merged weight; "
                "write one member first: kilobayes.write(model, kilobayes.tree.member(kilobayes.read(model), 0))"
            )
        return (update[0].mT if self.conv1d else update[0]).detach().to(like)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update of a stack of one, ``(d_out, d_in)``, or ``(d_in, d_out)`` for Conv1D, as PEFT's layers give."""
        return self._update(adapter, self.get_base_weight())

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return all(isinstance(op, LowRank) and op.A.shape[0] == 1 for op in self.operators())

    def __repr__(self) -> str:
        return "kilobayes." + super().__repr__()


class _Default:
    """torch's default generator as a stream, for training loops other than ours.

    There the adapter's dropout obeys ``torch.manual_seed`` and is replayed under gradient checkpointing, as a
    Trainer's users expect of every dropout layer.
    """

    def keep(self, like: Tensor, probability: float) -> Tensor:
        return torch.bernoulli(torch.full_like(like, probability))


def add(y: Tensor, x: Tensor, operator: Operator) -> Tensor:
    """Base output plus the update, block s of the rows through member s; y's dtype is kept."""
    some = operator.A if isinstance(operator, LowRank) else next(v for v in vars(operator).values() if v is not None)
    rows = blocks(x, some.shape[0]).flatten(1, -2)
    if some.dtype != rows.dtype:  # fp32 factors on a half-precision base: half-precision products, fp32 gradients
        operator = map_tensors(operator, lambda t: t.to(rows.dtype) if t.is_floating_point() else t)
    if isinstance(operator, LowRank) and y.dtype == rows.dtype and not torch.is_autocast_enabled(x.device.type):
        flat = y.reshape(len(rows), -1, y.shape[-1])
        out = torch.baddbmm(flat, torch.bmm(rows, operator.A.mT), operator.B.mT)
        return out.reshape(y.shape)
    return y + operator(rows).reshape(y.shape).to(y.dtype)
