"""From PEFT's VeRA: a checkpoint trained there becomes a stack of one, with the same logits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import VeraConfig
from torch import Tensor

from kilobayes.adapters.vera import VeRA, projections
from kilobayes.errors import KilobayesError
from kilobayes.host.export import PREFIX
from kilobayes.types import Params

SHARED = ("base_model.vera_A", "base_model.vera_B")
LEAVES = {"vera_lambda_b": "b", "vera_lambda_d": "d"}


@torch.no_grad()
def from_peft(tensors: Mapping[str, Tensor], config: VeraConfig) -> tuple[VeRA, Params]:
    """The adapter and the leaves ``(1, ...)``, float32, of a PEFT checkpoint.

    Put them on a base with ``get_peft_model(base, KilobayesConfig(adapter=..., target_modules=...,
    modules_to_save=..., task_type=...))``, the last three as in ``config``, and :func:`kilobayes.host.write`.
    Projections are not taken from the checkpoint but drawn again from its seed. Where the checkpoint holds
    them, they must be those that the seed gives, up to rounding if it holds them in half precision; where it
    does not, they are drawn as wide as the widest of the sites, as PEFT does.

    Args:
        tensors: the contents of ``adapter_model.safetensors``.
        config: of the same folder: ``PeftConfig.from_pretrained(folder)``. Its dropout concerns training
            alone, and is left out.

    Raises:
        KilobayesError: the checkpoint's projections are not those of its seed, it holds trained biases of the
            base or parts of a head that are not linear, half a pair of vectors, or vectors of another rank.
    """
    _check_projections(tensors, config)
    theta: Params = {}
    for key, value in tensors.items():
        if key not in SHARED:
            path, _, leaf = key.removeprefix(PREFIX).rpartition(".")
            name = LEAVES.get(leaf, leaf)
            _check_leaf(key, value, path, name, tensors, config)
            theta[f"{path}/{name}"] = value.detach().to(torch.float32, copy=True)[None]
    if not any(key.endswith("/d") for key in theta):
        raise KilobayesError(
            "the checkpoint holds no VeRA vectors",
            f"its tensors: {', '.join(sorted(tensors)[:3]) or 'none'}",
            "read adapter_model.safetensors of a folder that PEFT saved",
        )
    return VeRA(config.r, config.d_initial, config.projection_prng_key), theta


def _check_projections(tensors: Mapping[str, Tensor], config: VeraConfig) -> None:
    held = [tensors[key] for key in SHARED if key in tensors]
    if not held:
        return
    if len(held) == 1 or held[0].shape[0] != config.r or held[1].shape[1] != config.r:
        raise KilobayesError(
            f"the checkpoint's projections are not a pair of rank {config.r}",
            f"shapes {', '.join(str(tuple(value.shape)) for value in held)}",
            "take adapter_config.json and adapter_model.safetensors of one folder",
        )
    drawn = projections(config.r, held[0].shape[1], held[1].shape[0], config.projection_prng_key)
    if not all(torch.equal(mine.to(theirs), theirs) for mine, theirs in zip(drawn, held, strict=True)):
        raise KilobayesError(
            "the checkpoint's projections are not those of its seed",
            f"projection_prng_key={config.projection_prng_key}",
            "merge it with PEFT where it was trained: only b, d and the seed can be kept here",
        )


def _check_leaf(
    key: str, value: Tensor, path: str, name: str, tensors: Mapping[str, Tensor], config: VeraConfig
) -> None:
    if not key.startswith(PREFIX):
        raise KilobayesError("the checkpoint is not PEFT's", f"it holds {key}")
    if name in LEAVES.values():
        missing = [leaf for leaf in LEAVES if f"{PREFIX}{path}.{leaf}" not in tensors]
        if missing:
            raise KilobayesError(f"the checkpoint holds half of {path}", f"{missing[0]} is missing")
        if name == "d" and value.shape != (config.r,):
            raise KilobayesError(
                f"{path} has another rank than its configuration", f"{tuple(value.shape)} for r={config.r}"
            )
        return
    weight = tensors.get(f"{PREFIX}{path}.weight")
    if name not in ("weight", "bias") or weight is None or weight.dim() != 2:
        raise KilobayesError(
            "only VeRA's vectors and linear heads can be taken over",
            f"the checkpoint holds {key} {tuple(value.shape)}",
            'train with bias="none" and without other modules_to_save, or merge with PEFT',
        )
