"""VB-LoRA checkpoints that PEFT has written give the logits that they give under PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, VBLoRAConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from kilobayes import host
from kilobayes.adapters import VBLoRA
from kilobayes.adapters.vblora import NEVER
from kilobayes.errors import KilobayesError
from kilobayes.host import KilobayesConfig
from kilobayes.host.peft_vblora import BANK, from_peft

from .tiny import batch, close, make, scores

TARGETS = {"bert": ["query", "intermediate.dense"], "roberta": ["query", "value"], "gpt2": ["c_attn"]}
FILE = "adapter_model.safetensors"


def theirs(kind: str, **options: Any) -> Any:
    """A model with PEFT's VB-LoRA, away from its start, the head included."""
    options = {"r": 3, "num_vectors": 11, "vector_length": 8, "topk": 2} | options
    config = VBLoRAConfig(
        target_modules=TARGETS[kind], task_type="SEQ_CLS", fan_in_fan_out=kind == "gpt2", **options
    )
    model = get_peft_model(make(kind), config).eval()
    gen = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            size = 1.0 if "logits" in name else 0.2
            parameter.data += size * torch.randn(parameter.shape, generator=gen)
    return model


def ours(kind: str, folder: Path) -> tuple[Any, VBLoRA]:
    """The checkpoint on a model of ours, written as it was converted."""
    adapter, theta = from_peft(load_file(folder / FILE), PeftConfig.from_pretrained(str(folder)))
    config = KilobayesConfig(adapter=adapter, target_modules=TARGETS[kind], task_type="SEQ_CLS")
    model = get_peft_model(make(kind), config).eval()
    host.write(model, theta)
    return model, adapter


@pytest.mark.parametrize("kind", list(TARGETS))
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(("h", "k"), [(11, 2), (256, 3), (9, 1)])
def test_logits_are_peft_s(kind: str, compact: bool, h: int, k: int, tmp_path: Path) -> None:
    model = theirs(kind, save_only_topk_weights=compact, num_vectors=h, topk=k)
    expected = scores(model(**batch(kind)))
    assert (expected - scores(make(kind)(**batch(kind)))).abs().max() > 0.05
    model.save_pretrained(tmp_path)
    mine, adapter = ours(kind, tmp_path)
    assert adapter == VBLoRA(r=3, h=h, b=8, k=k)
    close(scores(mine(**batch(kind))), expected)
    if compact:
        assert all((v == NEVER).any() for key, v in host.read(mine).items() if "logits" in key)


@pytest.mark.parametrize("compact", [False, True])
def test_bfloat16_files_are_read_as_the_numbers_they_hold(compact: bool, tmp_path: Path) -> None:
    theirs("bert", save_only_topk_weights=compact, topk=3).to(torch.bfloat16).save_pretrained(tmp_path)
    mine, _ = ours("bert", tmp_path)
    found = scores(mine(**batch("bert")))
    tensors = load_file(tmp_path / FILE)
    assert tensors[BANK].dtype == torch.bfloat16
    # the same numbers in a float32 file, which PEFT can load whatever its format
    wide = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    save_file(wide, tmp_path / FILE, metadata={"format": "pt"})
    expected = PeftModel.from_pretrained(make("bert"), tmp_path).eval()
    close(found, scores(expected(**batch("bert"))))


def handmade(weights: Tensor, **options: Any) -> tuple[dict[str, Tensor], VBLoRAConfig]:
    config = VBLoRAConfig(r=1, topk=weights.shape[-1] + 1, **options)
    stem = "base_model.model.q.vblora_logits_A"
    indices = torch.arange(weights.shape[-1] + 1, dtype=torch.int16).expand(*weights.shape[:-1], -1)
    return {BANK: torch.eye(6), f"{stem}_topk_indices": indices, f"{stem}_topk_weights": weights}, config


def test_weights_that_round_to_more_than_one_give_no_nan() -> None:
    weights = torch.tensor([[[0.75, 0.2500001], [1.0, 1e-30], [0.5, 0.3]]])
    assert 1 - weights.sum(-1)[0, 0] < 0
    _, theta = from_peft(*handmade(weights))
    found = theta["q/logits_A"][0, 0, :, :3].softmax(-1)
    torch.testing.assert_close(found, torch.tensor([[0.75, 0.25, 0.0], [1.0, 0.0, 0.0], [0.5, 0.3, 0.2]]))
    assert (theta["q/logits_A"][..., :3] > NEVER / 2).all()  # still the chosen ones


def test_other_files_are_refused() -> None:
    weights = torch.tensor([[[0.7]]])
    tensors, config = handmade(weights)
    with pytest.raises(KilobayesError, match="bias='all'"):
        from_peft(*handmade(weights, bias="all"))
    with pytest.raises(KilobayesError, match="no vector bank"):
        from_peft({k: v for k, v in tensors.items() if k != BANK}, config)
    with pytest.raises(KilobayesError, match="lacks weights"):
        from_peft({k: v for k, v in tensors.items() if not k.endswith("weights")}, config)
