"""Reading, writing and installing stacks on a hosted model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from kilobayes.errors import KilobayesError
from kilobayes.host.head import StackedLinear, Whole
from kilobayes.host.layer import SHARED, KilobayesLayer
from kilobayes.tree import leaves_of, size
from kilobayes.types import Operator, Params, Site, map_tensors

Built = dict[str, Operator]  # by site or head path


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model inside a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def active(model: nn.Module, name: str | None = None) -> str:
    """The active adapter's name, or ``name`` itself.

    Raises:
        KilobayesError: the model carries no kilobayes adapter.
    """
    for module in model.modules():
        if isinstance(module, KilobayesLayer) and module.kilobayes_leaves:
            return name or module.active_adapters[0]
    raise KilobayesError(
        "the model carries no kilobayes adapter", remedy="get_peft_model(model, KilobayesConfig(adapter=...)) adds one"
    )


def layers(model: nn.Module, name: str | None = None) -> dict[str, KilobayesLayer]:
    """The adapted layers by site, in the model's order."""
    name = active(model, name)
    found = base_of(model).named_modules()
    return {m.site.name: m for _, m in found if isinstance(m, KilobayesLayer) and name in m.kilobayes_leaves}


def heads(model: nn.Module, name: str | None = None) -> dict[str, StackedLinear]:
    """The trained linear layers of the heads by their path in the base model."""
    name = active(model, name)
    part = f".modules_to_save.{name}"
    found = base_of(model).named_modules()
    return {n.replace(part, ""): m for n, m in found if isinstance(m, StackedLinear) and f"{part}." in f"{n}."}


def sites(model: nn.Module, name: str | None = None) -> list[Site]:
    return [layer.site for layer in layers(model, name).values()]


def read(model: nn.Module, name: str | None = None) -> Params:
    """The trainable leaves of an adapter, heads included: the live parameters, not copies."""
    return {key: holder[leaf] for key, holder, leaf in _slots(model, active(model, name))}


def _slots(model: nn.Module, name: str) -> Iterator[tuple[str, Any, str]]:
    """(key, mapping that holds the parameter, its name there) of every trainable leaf."""
    for site, layer in layers(model, name).items():
        holder: Any = layer.kilobayes_leaves[name]
        for leaf in holder:
            yield (f"*/{leaf.removeprefix(SHARED)}" if leaf.startswith(SHARED) else f"{site}/{leaf}"), holder, leaf
    for path, head in heads(model, name).items():
        for leaf, value in head._parameters.items():
            if value is not None:
                yield f"{path}/{leaf}", head._parameters, leaf


def write(model: nn.Module, theta: Params, name: str | None = None) -> None:
    """Put a stack into the model's parameters; its S may differ from the one before.

    Raises:
        KilobayesError: a leaf is missing, unknown, or has another shape.
    """
    name = active(model, name)
    slots = {key: (holder, leaf) for key, holder, leaf in _slots(model, name)}
    if set(slots) != set(theta):
        odd = sorted(set(slots) ^ set(theta))[:3]
        raise KilobayesError("the stack does not fit the model", f"leaves only on one side: {', '.join(odd)}")
    for key, (holder, leaf) in slots.items():
        old = holder[leaf]
        if theta[key].shape[1:] != old.shape[1:]:
            raise KilobayesError(f"leaf {key} has another shape", f"{tuple(theta[key].shape)} for {tuple(old.shape)}")
        value = theta[key].detach().to(device=old.device, dtype=old.dtype).clone()
        holder[leaf] = nn.Parameter(value, requires_grad=old.requires_grad)
    configs = getattr(model, "peft_config", {})
    if name in configs:
        configs[name].stack = size(theta)


def build(model: nn.Module, theta: Params, name: str | None = None) -> Built:
    """The operators of a stack, one per site and head; differentiable in ``theta``."""
    name = active(model, name)
    out: Built = {}
    for site, layer in layers(model, name).items():
        out[site] = layer.methods[name].build(leaves_of(theta, site), layer.constants[name], layer.site)
    for path in heads(model, name):
        out[path] = Whole(theta[f"{path}/weight"], theta.get(f"{path}/bias"))
    return out


def install(model: nn.Module, built: Built | None, name: str | None = None) -> None:
    """Let the forward use these operators instead of the parameters, until replaced or, with None, removed.

    They stay after the forward, since gradient checkpointing runs the layers again in the backward.
    """
    members: Mapping[str, Any] = {**layers(model, name), **heads(model, name)}
    for path, member in members.items():
        member.installed = None if built is None else built[path]


def detach(built: Built) -> Built:
    """The same operators over fresh leaf tensors, to collect the gradients of several backward passes."""

    def leaf(t: Tensor) -> Tensor:
        return t.detach().requires_grad_(t.requires_grad)

    return {path: map_tensors(operator, leaf) for path, operator in built.items()}


def is_head_key(model: nn.Module, key: str) -> bool:
    return any(key.startswith(f"{path}/") for path in heads(model))


def without_adapter(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The frozen base's tensors under their original names, whatever is hosted on it."""
    for name, tensor in base_of(model).state_dict().items():
        if ".kilobayes_leaves." in name or ".modules_to_save." in name:
            continue
        yield name.replace(".base_layer.", ".").replace(".original_module.", "."), tensor


__all__ = [
    "Built", "active", "base_of", "build", "detach", "heads", "install", "is_head_key",
    "layers", "read", "sites", "without_adapter", "write",
]  # fmt: skip
