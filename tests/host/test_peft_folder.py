"""Folders that PEFT saved, whichever method both know, give the same logits here."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import IA3Config, LoraConfig, VBLoRAConfig, VeraConfig, get_peft_model

import kilobayes as kb
from kilobayes import host
from kilobayes.errors import KilobayesError

from .tiny import batch, close, config, make

QV = ["query", "value"]
METHODS = {
    "LoRA": LoraConfig(r=3, target_modules=QV, task_type="SEQ_CLS"),
    "VeRA": VeraConfig(r=6, target_modules=QV, task_type="SEQ_CLS"),
    "VB-LoRA": VBLoRAConfig(r=2, num_vectors=9, vector_length=16, target_modules=QV, task_type="SEQ_CLS"),
    "compact": VBLoRAConfig(
        r=2,
        num_vectors=9,
        vector_length=16,
        target_modules=QV,
        task_type="SEQ_CLS",
        save_only_topk_weights=True,
    ),
}


def saved(name, folder, seed=3):
    """Logits under PEFT away from the start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(make("bert"), METHODS[name]).eval()
        gen = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=gen)
        out = model(**batch("bert")).logits.detach()
        model.save_pretrained(str(folder))
    return out


@pytest.mark.parametrize("name", METHODS)
def test_the_logits_are_pefts(name, tmp_path):
    expected = saved(name, tmp_path)
    model = kb.load_peft(make("bert"), tmp_path)
    close(model(**batch("bert")).logits, expected, 1e-5)
    assert host.sites(model)
    assert type(host.method(model)).__name__ in ("LoRA", "VeRA", "VBLoRA")


def test_ours_load_as_they_are(tmp_path):
    model = get_peft_model(make("bert"), config("bert", adapter="NOLA()")).eval()
    model.save_pretrained(tmp_path)
    assert torch.equal(
        kb.load_peft(make("bert"), tmp_path)(**batch("bert")).logits, model(**batch("bert")).logits
    )


def test_wrong_folders(tmp_path):
    with pytest.raises(KilobayesError, match=r"adapter_config.json is missing"):
        kb.load_peft(make("bert"), tmp_path)
    other = get_peft_model(
        make("bert"), IA3Config(target_modules=["key"], feedforward_modules=[], task_type="SEQ_CLS")
    )
    other.save_pretrained(tmp_path)
    with pytest.raises(KilobayesError, match=r"IA3 cannot be read.*LORA, KILOBAYES, VBLORA, VERA"):
        kb.load_peft(make("bert"), tmp_path)
