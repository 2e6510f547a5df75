"""The adapted layer: a frozen base layer as a black box, plus the operator that the adapter builds."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from kilobayes import parametrise
from kilobayes.errors import KilobayesError
from kilobayes.host.check import BaseCheck
from kilobayes.host.linear import update_matrix
from kilobayes.host.packing import frozen_weights, low_rank_linear
from kilobayes.host.rows import add, blocks, members
from kilobayes.random import DefaultStream
from kilobayes.types import Adapter, LowRank, Operator, Params, Site, map_tensors

SHARED = "shared_"  # leaves shared by all sites live in the first site's layer under this prefix


def adaptable(module: nn.Module, **quantization: Any) -> bool:
    """Whether a module is a linear layer, plain, Conv1D or quantised, and is called as one."""
    if isinstance(
        module, NonDynamicallyQuantizableLinear
    ):  # nn.MultiheadAttention reads its weight, not its forward
        return False
    return (
        isinstance(module, nn.Linear | Conv1D)
        or resolve_quantization_backend(module, **quantization) is not None
    )


class KilobayesLayer(nn.Module, BaseTunerLayer):
    """Holds the leaves of each adapter of one site, ``(S, ...)``, and calls the adapter's pure ``build``.

    Raises:
        KilobayesError: the base layer is not linear.
    """

    adapter_layer_names = ("kilobayes_leaves",)
    other_param_names = ("methods", "constants", "shared", "kilobayes_checks")

    def __init__(self, base_layer: nn.Module, path: str, **quantization: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.path = path
        self.kilobayes_leaves = nn.ModuleDict()
        self.kilobayes_checks = nn.ModuleDict()
        self.methods: dict[str, Adapter] = {}
        self.constants: dict[str, Params] = {}
        self.shared: dict[str, KilobayesLayer] = {}  # where an adapter's shared leaves live, by adapter name
        self.installed: Operator | None = None
        self.member: int | None = None  # set while one member alone is computed
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        base = self.get_base_layer()
        if not adaptable(base, **quantization):
            found = f"it is a {type(base).__name__}, not a linear layer"
            raise KilobayesError(f"{path} cannot be adapted", found, "take it out of target_modules")
        self.conv1d = isinstance(base, Conv1D)
        self.d_in, self.d_out = (int(d) for d in _get_in_out_features(base) if d is not None)
        self.quantization_backend = resolve_quantization_backend(base, **quantization)

    @property
    def site(self) -> Site:
        return Site(self.path, self.d_in, self.d_out, self.dequantised)

    def dequantised(self) -> Tensor:
        """The base weight ``(d_out, d_in)`` in its own dtype; a view where it is stored plainly."""
        weight = self.get_base_weight()
        return weight.T if self.conv1d else weight

    def fill(self, name: str, method: Adapter, leaves: Params, constants: Params, trainable: bool) -> None:
        """Give the layer an adapter's leaves: on the base's device (or still on meta), in their own dtype."""
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())

        def place(t: Tensor) -> Tensor:
            return t if t.is_meta else t.to(device)

        self.methods[name] = method
        self.constants[name] = {k: place(v) for k, v in constants.items()}
        if any(not k.startswith(SHARED) for k in constants):
            self.kilobayes_checks[name] = BaseCheck(self.path, constants)
        self.kilobayes_leaves[name] = nn.ParameterDict(
            {k: nn.Parameter(place(v), requires_grad=trainable) for k, v in leaves.items()}
        )

    def operator(self, name: str, dropout: bool = False) -> Operator:
        """The operator built from an adapter's leaves; with ``dropout``, under a sample of its own."""
        own: Any = self.kilobayes_leaves[name]
        leaves = self._with_shared(name, own, lambda owner: owner.kilobayes_leaves[name])
        method = self.methods[name]
        if dropout:
            placed = {f"{self.path}/{k}": v for k, v in leaves.items()}
            dropped = parametrise.drop(method, placed, DefaultStream())
            leaves = {k.rpartition("/")[2]: v for k, v in dropped.items()}
        return method.build(leaves, self.frozen(name), self.site)

    def frozen(self, name: str) -> Params:
        """An adapter's constants at this site, shared ones included, by their names alone."""
        return self._with_shared(name, self.constants[name], lambda owner: owner.constants[name])

    def _with_shared(self, name: str, own: Params, of: Callable[[KilobayesLayer], Any]) -> Params:
        """What is the site's own, and what all sites share, which the first site's layer holds."""
        found = {k: v for k, v in own.items() if not k.startswith(SHARED)}
        if name in self.shared:
            held = of(self.shared[name])
            found |= {k.removeprefix(SHARED): v for k, v in held.items() if k.startswith(SHARED)}
        return found

    def operators(self) -> list[Operator]:
        """What the forward adds to the base: the installed operator, or those of the active adapters."""
        if self.installed is not None:
            found = [self.installed]
        else:
            found = [
                self.operator(n, self.training) for n in self.active_adapters if n in self.kilobayes_leaves
            ]
        if self.member is None:
            return found
        one = slice(self.member, self.member + 1)
        return [map_tensors(operator, lambda t: t[one]) for operator in found]

    def stack(self) -> int:
        """S of what the forward adds; 1 where that is nothing."""
        if self.disable_adapters or self.merged:
            return 1
        if self.installed is not None:
            return members(self.installed)
        used = [self.kilobayes_leaves[n] for n in self.active_adapters if n in self.kilobayes_leaves]
        return max((next(iter(leaves.values())).shape[0] for leaves in used), default=1)  # type: ignore[operator]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        active = self.operators()
        if len(active) == 1 and isinstance(active[0], LowRank) and not args and not kwargs:
            frozen = frozen_weights(self.base_layer)
            if frozen is not None and x.dtype == active[0].A.dtype:
                blocks(x[:, :0], active[0].A.shape[0])  # the row check, on no data
                return low_rank_linear(x, frozen, active[0].A, active[0].B)
        y = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            y = self.quantization_backend.maybe_clone_base_result(y)
        for operator in active:
            y = add(y, x, operator)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the update to the base weight.

        Raises:
            KilobayesError: a stack of more than one, or a NaN or infinity under ``safe_merge``.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.kilobayes_leaves:
                weight = self._plus(name, 1.0)
                if safe_merge and not torch.isfinite(weight).all():
                    raise KilobayesError(
                        f"the merged weight of {self.path} is not finite",
                        f"adapter {name!r} holds NaN, infinity or values too large for {weight.dtype}",
                        "train it again with a lower learning rate",
                    )
                self.set_base_weight(weight)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            self.set_base_weight(self._plus(self.merged_adapters[-1], -1.0))
            self.merged_adapters.pop()

    def _plus(self, name: str, sign: float) -> Tensor:
        """The base weight plus or minus the update: summed in the wider dtype, rounded once."""
        weight = self.get_base_weight()
        return (weight + sign * self.get_delta_weight(name)).to(weight.dtype)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update of a stack of one: ``(d_out, d_in)``, or ``(d_in, d_out)`` for Conv1D, as in PEFT.

        Raises:
            KilobayesError: the stack is larger, or the operator is not linear.
        """
        operator = self.operator(adapter)
        require_single(adapter, members(operator))
        update = update_matrix(adapter, self.path, operator, self.d_in)
        return update[0].mT if self.conv1d else update[0]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        operator = self.operator(adapter_name)
        return isinstance(operator, LowRank) and operator.A.shape[0] == 1

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT's own also takes the base's dtype, which rounds float32 leaves and constants loaded on a
        # bfloat16 base.
        device = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        if adapter_name in self.kilobayes_leaves and device is not None:
            self.kilobayes_leaves[adapter_name].to(device)
            self.constants[adapter_name] = {k: v.to(device) for k, v in self.constants[adapter_name].items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Constants follow the base from device to device, but keep their precision.
        out = super()._apply(fn, recurse)
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if device is not None and device.type != "meta":
            self.constants = {n: {k: v.to(device) for k, v in c.items()} for n, c in self.constants.items()}
        return out

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"installed": None}  # copies do not share installed operators, nor their graph

    def __repr__(self) -> str:
        return "kilobayes." + super().__repr__()


def require_single(name: str, stack: int) -> None:
    """Refuse to make one weight of several members.

    Raises:
        KilobayesError: the stack is larger than one.
    """
    if stack != 1:
        raise KilobayesError(
            f"adapter {name!r} has no single weight: its members would have to be averaged or chosen from",
            f"a stack of {stack}",
            "write one member first: host.write(model, tree.member(host.read(model), 0))",
        )
