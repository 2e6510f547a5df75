"""The smallest file of an adapter: its packed tensors, all sites together, and a check value for each site.

``adapter_compact.safetensors`` beside ``adapter_config.json``. What is not stored is made again from the
configuration and the base: seeds, projections, decompositions.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from kilobayes import __version__, parametrise, tree
from kilobayes.checkpoint import read_tensors, write_atomically
from kilobayes.errors import KilobayesError
from kilobayes.host.check import TOLERANCE, digest
from kilobayes.host.config import KilobayesConfig
from kilobayes.host.stack import active, build, heads, layers, method, read, sites, uncovered, write
from kilobayes.types import Params, Site, delta

FILE = "adapter_compact.safetensors"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
GROUP = 64  # numbers that share a scale in int8
SAMPLED = 4096  # entries of a base weight that its check value sees


@torch.no_grad()
def export_compact(
    model: nn.Module, directory: str | Path, name: str | None = None, dtype: str = "float32"
) -> dict[str, float]:
    """Write an adapter's compact file; :func:`load_compact` reads it.

    Args:
        model: a hosted model; a stack is written whole.
        dtype: of the packed numbers: float32, float16, bfloat16 or int8 (64 numbers share a scale). Heads
            stay float32.

    Returns:
        Bytes of the adapter's tensors (``adapter``), of the heads' (``head``), of the check values
        (``check``) and of the file (``file``), and how far the narrower numbers move the updates
        (``error``): relative, in the Frobenius norm over all sites.

    Raises:
        KilobayesError: an unknown dtype, numbers too large for it, or trained parts that have no stack.
    """
    if dtype not in DTYPES:
        raise KilobayesError(f"dtype {dtype!r} is not known", f"known: {', '.join(DTYPES)}")
    name = active(model, name)
    if lost := uncovered(model, name):
        raise KilobayesError("only adapters and linear heads have a compact file", f"also trained: {lost[0]}")
    adapter, places = method(model, name), sites(model, name)
    theta = {k: v.detach().float().cpu() for k, v in read(model, name).items()}
    head = {k: v for k, v in theta.items() if _of_head(model, name, k)}
    own = {k: v for k, v in theta.items() if k not in head}
    packed = narrow(parametrise.pack(adapter, own, places), dtype)
    held = {f"head|{k}": v for k, v in head.items()}
    check = torch.tensor([_check(site) for site in places], dtype=torch.float32)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    about = {"kilobayes": __version__, "adapter": repr(adapter), "dtype": dtype}
    write_atomically(folder / FILE, packed | held | {"check": check}, about)
    model.peft_config[name].save_pretrained(str(folder))  # type: ignore[union-attr, index]
    back = parametrise.unpack(adapter, widen(packed), places, own) | head
    return {
        "adapter": tree.total_bytes(packed.values()),
        "head": tree.total_bytes(held.values()),
        "check": tree.total_bytes([check]),
        "file": (folder / FILE).stat().st_size,
        "error": _difference(model, theta, back, name),
    }


def load_compact(base: nn.Module, directory: str | Path) -> PeftModel:
    """The base with the adapter of a compact file hosted on it, to predict with or to train on.

    Raises:
        KilobayesError: files missing or damaged, another base or another adapter than the configuration says.
    """
    folder = Path(directory)
    tensors, about = read_tensors(folder / FILE)
    if not (folder / "adapter_config.json").is_file():  # PEFT would ask the hub
        raise KilobayesError(f"{folder / 'adapter_config.json'} is missing", remedy="copy the folder whole")
    config: Any = KilobayesConfig.from_pretrained(str(folder))
    if repr(config.method) != about.get("adapter"):
        found = f"{config.method!r} and {about.get('adapter')}"
        raise KilobayesError(f"{folder} holds parts of two adapters", found, "copy the folder whole")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*inference_mode.*")
        model: Any = get_peft_model(base, config)  # type: ignore[arg-type]
    places = sites(model)
    check = tensors.pop("check")
    if len(check) != len(places):
        found = f"{len(places)} sites there, {len(check)} in the file"
        raise KilobayesError("the adapter is of another base model", found, f"load {_named(config)}")
    for site, wanted in zip(places, check.tolist(), strict=True):
        if abs(_check(site) - wanted) > TOLERANCE:
            found = f"{site.name} has the check value {_check(site):.6g}, the file {wanted:.6g}"
            raise KilobayesError("the adapter is of another base model", found, f"load {_named(config)}")
    head = {k.removeprefix("head|"): v for k, v in tensors.items() if k.startswith("head|")}
    packed = widen({k: v for k, v in tensors.items() if not k.startswith("head|")})
    stack = max(config.stack, 1)
    like = {k: v.detach().expand(stack, *v.shape[1:]) for k, v in read(model).items() if k not in head}
    try:
        own = parametrise.unpack(config.method, packed, places, like)
    except (KeyError, RuntimeError, ValueError) as error:
        raise KilobayesError(f"{folder / FILE} does not hold {config.method!r}", str(error)) from None
    write(model, own | head)
    return model  # type: ignore[no-any-return]


def narrow(tensors: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Float tensors in fewer bits; int8 as codes and, under ``name~scale``, a float16 for each 64 numbers.

    Raises:
        KilobayesError: numbers too large for the type.
    """
    out: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if not value.is_floating_point() or dtype == "float32":
            out[key] = value
            continue
        if dtype == "int8":
            rows = value.flatten(1)
            groups = torch.nn.functional.pad(rows, (0, -rows.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
            scale = (groups.abs().amax(dim=2) / 127).to(torch.float16)
            step = scale.float().clamp(min=1e-24)[..., None]
            out[key] = (groups / step).round().clamp(-127, 127).to(torch.int8).flatten(1)[:, : rows.shape[1]]
            out[key] = out[key].reshape(value.shape)
            out[f"{key}~scale"] = scale
        else:
            out[key] = value.to(DTYPES[dtype])
        if not all(bool(v.isfinite().all()) for k, v in out.items() if k.startswith(key)):
            raise KilobayesError(f"{key} holds numbers too large for {dtype}", remedy="take bfloat16")
    return out


def widen(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`narrow` up to rounding: float32."""
    out: dict[str, Tensor] = {}
    for key, value in tensors.items():
        scale = tensors.get(f"{key}~scale")
        if scale is not None:
            step = scale.float().repeat_interleave(GROUP, dim=1)
            rows = value.flatten(1).float()
            out[key] = (rows * step[:, : rows.shape[1]]).reshape(value.shape)
        elif not key.endswith("~scale"):
            out[key] = value.float() if value.is_floating_point() else value
    return out


def _of_head(model: nn.Module, name: str, key: str) -> bool:
    return tree.split_key(key)[0] in heads(model, name)


def _check(site: Site) -> float:
    """A number of some of a base weight's entries, at even distances."""
    flat = site.weight().detach().flatten()
    return float(digest(flat[:: max(1, len(flat) // SAMPLED)]))


def _difference(model: nn.Module, theta: Params, back: Params, name: str) -> float:
    """The distance of two stacks' updates over all sites, relative to the first's norm."""
    if all(torch.equal(theta[k], back[k]) for k in theta):
        return 0.0
    device = next(iter(layers(model, name).values())).get_base_weight().device
    ours, theirs = (build(model, {k: v.to(device) for k, v in p.items()}, name) for p in (theta, back))
    apart = norm = 0.0
    for path, layer in layers(model, name).items():
        update = delta(ours[path], layer.d_in)
        apart += float((delta(theirs[path], layer.d_in) - update).square().sum())
        norm += float(update.square().sum())
    return (apart / norm) ** 0.5 if norm else 0.0


def _named(config: Any) -> str:
    return str(config.base_model_name_or_path or "the base that it was made on")
