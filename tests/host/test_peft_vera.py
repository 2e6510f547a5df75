"""VeRA checkpoints of PEFT give here the logits that they gave there."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from kilobayes import host, tree
from kilobayes.adapters import VeRA
from kilobayes.errors import KilobayesError
from kilobayes.host import KilobayesConfig
from kilobayes.host.peft_vera import from_peft

from .tiny import TASK, batch, close, make, scores

KEPT = ("task_type", "target_modules", "layers_to_transform", "modules_to_save")


def saved(kind: str, folder: Path, **options: Any) -> tuple[Tensor, dict[str, Tensor], Any]:
    """Logits under PEFT of a VeRA away from its start, the file's tensors, and its configuration."""
    options = {"r": 12, "task_type": TASK.get(kind, "SEQ_CLS"), "fan_in_fan_out": "gpt2" in kind} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a seed may not be enough is PEFT's warning
        model = get_peft_model(make(kind), VeraConfig(**options)).eval()
        gen = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.5 * torch.randn(parameter.shape, generator=gen)
        logits = scores(model(**batch(kind))).detach()
        model.save_pretrained(str(folder))
        return (
            logits,
            load_file(folder / "adapter_model.safetensors"),
            PeftConfig.from_pretrained(str(folder)),
        )


def ours(kind: str, method: VeRA, theta: dict[str, Tensor], config: Any) -> Tensor:
    kept = {key: getattr(config, key) for key in KEPT}
    model = get_peft_model(make(kind), KilobayesConfig(adapter=method, **kept)).eval()
    host.write(model, theta)
    with torch.no_grad():
        return scores(model(**batch(kind)))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bert", {"target_modules": ["query", "value"]}),
        ("bert", {"target_modules": "all-linear", "projection_prng_key": 5, "d_initial": 0.3}),
        ("bert", {"target_modules": "all-linear", "save_projection": False}),
        ("bert", {"target_modules": ["query", "dense"], "layers_to_transform": [1, 2], "r": 3}),
        ("roberta", {"target_modules": ["query", "output.dense"]}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
        ("llama_lm", {"target_modules": ["q_proj", "v_proj", "down_proj"], "save_projection": False}),
    ],
)
def test_the_logits_are_pefts(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    expected, tensors, config = saved(kind, tmp_path, **options)
    assert ("base_model.vera_A" in tensors) == options.get("save_projection", True)
    method, theta = from_peft(tensors, config)
    assert method == VeRA(config.r, config.d_initial, config.projection_prng_key)
    assert tree.size(theta) == 1
    found = ours(kind, method, theta, config)
    close(found, expected, 1e-5)
    base = make(kind)
    with torch.no_grad():  # the update is not small: the test would see its absence
        assert float((scores(base(**batch(kind))) - expected).abs().max()) > 0.01


def test_leaves_are_copies_in_float32(tmp_path: Path) -> None:
    _, tensors, config = saved("bert", tmp_path, target_modules=["query"])
    half = {key: value.bfloat16() for key, value in tensors.items()}
    _, theta = from_peft(half, config)
    assert {value.dtype for value in theta.values()} == {torch.float32}
    before = tree.clone(theta)
    for value in half.values():
        value.zero_()
    assert not tree.first_difference(theta, before)


def broken(tensors: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    out = dict(tensors)
    key = "base_model.model.bert.encoder.layer.0.attention.self.query.vera_lambda_"
    if how == "projection":
        out["base_model.vera_A"] = out["base_model.vera_A"].clone()
        out["base_model.vera_A"][1, 2] += 1e-6
    elif how == "one":
        del out["base_model.vera_B"]
    elif how == "half":
        del out[key + "d"]
    elif how == "rank":
        out[key + "d"] = torch.ones(3)
    elif how == "bias":
        out["base_model.model.bert.encoder.layer.0.attention.self.query.base_layer.bias"] = torch.ones(32)
    elif how == "other":
        out["bert.pooler.weight"] = torch.ones(2, 2)
    elif how == "none":
        out = {k: v for k, v in out.items() if "lambda" not in k}
    return out


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("projection", "not those of its seed"),
        ("one", "not a pair of rank 12"),
        ("half", "vera_lambda_d is missing"),
        ("rank", "another rank"),
        ("bias", "only VeRA's vectors and linear heads"),
        ("other", "not PEFT's"),
        ("none", "no VeRA vectors"),
    ],
)
def test_what_cannot_be_taken_over_is_refused(how: str, message: str, tmp_path: Path) -> None:
    _, tensors, config = saved("bert", tmp_path, target_modules=["query"])
    with pytest.raises(KilobayesError, match=message):
        from_peft(broken(tensors, how), config)


def test_another_seed_or_rank_than_the_files_is_refused(tmp_path: Path) -> None:
    _, tensors, config = saved("bert", tmp_path, target_modules=["query"])
    config.projection_prng_key = 1
    with pytest.raises(KilobayesError, match="not those of its seed"):
        from_peft(tensors, config)
    config.projection_prng_key, config.r = 0, 5
    with pytest.raises(KilobayesError, match="rank 5"):
        from_peft(tensors, config)
