"""Reading, writing and installing stacks on a hosted model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kilobayes.errors import KilobayesError, nearest
from kilobayes.host import tokens
from kilobayes.host.head import StackedLinear, Whole
from kilobayes.host.layer import SHARED, KilobayesLayer
from kilobayes.tree import leaves_of, size
from kilobayes.types import Adapter, Operator, Params, Site, map_tensors

Built = dict[str, Operator]  # by site or head path; seeds of masks by theirs


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model inside a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def active(model: nn.Module, name: str | None = None) -> str:
    """The active adapter's name, or ``name`` itself, if the model carries it.

    Raises:
        KilobayesError: there is no such adapter, or several are active and none was named.
    """
    hosted = [m for m in model.modules() if isinstance(m, KilobayesLayer)]
    names = sorted({key for layer in hosted for key in layer.kilobayes_leaves})
    if not names:
        raise KilobayesError(
            "the model carries no kilobayes adapter",
            remedy="get_peft_model(model, KilobayesConfig(adapter=...)) adds one",
        )
    if name is None:
        switched_on = sorted({key for layer in hosted for key in layer.active_adapters if key in names})
        if len(switched_on) != 1:
            raise KilobayesError(
                "it is not clear which adapter is meant",
                f"active: {', '.join(switched_on) or 'none'} of {', '.join(names)}",
                "model.set_adapter(name) chooses one",
            )
        return switched_on[0]
    if name not in names:
        guess = nearest(name, names)
        raise KilobayesError(
            f"the model carries no adapter called {name!r}",
            f"it carries: {', '.join(names)}",
            f"did you mean {guess}?" if guess else "",
        )
    return name


def layers(model: nn.Module, name: str | None = None) -> dict[str, KilobayesLayer]:
    """The adapted layers by site, in the model's order."""
    name = active(model, name)
    found = base_of(model).modules()
    return {m.path: m for m in found if isinstance(m, KilobayesLayer) and name in m.kilobayes_leaves}


def heads(model: nn.Module, name: str | None = None) -> dict[str, StackedLinear]:
    """The trained linear layers of the heads by their path in the base model."""
    name = active(model, name)
    part = f".modules_to_save.{name}"
    found = base_of(model).named_modules()
    return {
        n.replace(part, ""): m for n, m in found if isinstance(m, StackedLinear) and f"{part}." in f"{n}."
    }


def sites(model: nn.Module, name: str | None = None) -> list[Site]:
    return [layer.site for layer in layers(model, name).values()]


def method(model: nn.Module, name: str | None = None) -> Adapter:
    """An adapter's method, such as ``LoRA(r=8)``."""
    name = active(model, name)
    return next(iter(layers(model, name).values())).methods[name]


def read(model: nn.Module, name: str | None = None) -> Params:
    """The trainable leaves of an adapter, heads included: the live parameters, not copies."""
    return {key: holder[leaf] for key, holder, leaf in _slots(model, active(model, name))}


def _slots(model: nn.Module, name: str) -> Iterator[tuple[str, Any, str]]:
    """(key, mapping that holds the parameter, its name there) of every trainable leaf."""
    for site, layer in layers(model, name).items():
        holder: Any = layer.kilobayes_leaves[name]
        for leaf in holder:
            yield (
                (f"*/{leaf.removeprefix(SHARED)}" if leaf.startswith(SHARED) else f"{site}/{leaf}"),
                holder,
                leaf,
            )
    for path, head in heads(model, name).items():
        for leaf, value in head._parameters.items():
            if value is not None:
                yield f"{path}/{leaf}", head._parameters, leaf


def uncovered(model: nn.Module, name: str | None = None) -> list[str]:
    """Names of trainable parameters that :func:`read` leaves out: PEFT trains them, no posterior sees them.

    They come from ``bias=`` and from parts of ``modules_to_save`` that are not linear layers.
    """
    covered = {id(value) for value in read(model, name).values()}
    return [n for n, p in base_of(model).named_parameters() if p.requires_grad and id(p) not in covered]


def write(model: nn.Module, theta: Params, name: str | None = None) -> None:
    """Put a stack into the model's parameters; its S may differ from the one before.

    With the same S the values are copied into the parameters that an optimiser may hold; else there are new
    ones.

    Raises:
        KilobayesError: a leaf is missing, unknown, or has another shape; nothing is written then.
    """
    name = active(model, name)
    slots = {key: (holder, leaf) for key, holder, leaf in _slots(model, name)}
    if set(slots) != set(theta):
        odd = sorted(set(slots) ^ set(theta))[:3]
        raise KilobayesError("the stack does not fit the model", f"leaves only on one side: {', '.join(odd)}")
    stack = size(theta)
    for key, (holder, leaf) in slots.items():
        wanted = (stack, *holder[leaf].shape[1:])
        if theta[key].shape != wanted:
            raise KilobayesError(f"leaf {key} has another shape", f"{tuple(theta[key].shape)} for {wanted}")
    for key, (holder, leaf) in slots.items():
        old = holder[leaf]
        value = theta[key].detach().to(device=old.device, dtype=old.dtype)
        if value.shape == old.shape:
            with torch.no_grad():
                old.copy_(value)
        else:
            holder[leaf] = nn.Parameter(value.clone(), requires_grad=old.requires_grad)
    configs = getattr(model, "peft_config", {})
    if name in configs:
        configs[name].stack = stack


def build(model: nn.Module, theta: Params, name: str | None = None) -> Built:
    """The operators of a stack, one per site and head; differentiable in ``theta``."""
    name = active(model, name)
    theta, out = tokens.split(theta)
    for site, layer in layers(model, name).items():
        out[site] = layer.methods[name].build(leaves_of(theta, site), layer.frozen(name), layer.site)
    for path in heads(model, name):
        out[path] = Whole(theta[f"{path}/weight"], theta.get(f"{path}/bias"))
    return out


def constants(model: nn.Module, name: str | None = None) -> Params:
    """An adapter's frozen constants, by ``"site/name"``, and ``"*/name"`` for those that all sites share."""
    name = active(model, name)
    out: Params = {}
    for site, layer in layers(model, name).items():
        for key, value in layer.constants[name].items():
            out[f"*/{key.removeprefix(SHARED)}" if key.startswith(SHARED) else f"{site}/{key}"] = value
    return out


def install(model: nn.Module, built: Built | None, name: str | None = None) -> None:
    """Let the forward use these operators instead of the parameters, until replaced or, with None, removed.

    They stay after the forward, since gradient checkpointing runs the layers again in the backward. They
    belong to the model, not to an adapter's name: remove them before another adapter is made active.

    Raises:
        KilobayesError: the adapter is merged into the base.
    """
    members: Mapping[str, Any] = {**layers(model, name), **heads(model, name)}
    if built is not None and any(getattr(member, "merged_adapters", ()) for member in members.values()):
        raise KilobayesError(
            "the adapter is merged into the base, which would hide what is installed",
            remedy="model.unmerge_adapter() first",
        )
    masked = tokens.wrapped(base_of(model), layers(model, name), built)
    for path, member in members.items():
        member.installed = None if built is None else masked[path]


def detach(built: Built) -> Built:
    """The same operators over fresh leaf tensors, to collect the gradients of several backward passes."""

    def leaf(t: Tensor) -> Tensor:
        return t.detach().requires_grad_(t.requires_grad)

    return {path: map_tensors(operator, leaf) for path, operator in built.items()}


def without_adapter(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The frozen base's tensors under their original names, whatever is hosted on it."""
    for name, tensor in base_of(model).state_dict().items():
        if ".kilobayes_leaves." in name or ".modules_to_save." in name:
            continue
        yield name.replace(".base_layer.", ".").replace(".original_module.", "."), tensor
