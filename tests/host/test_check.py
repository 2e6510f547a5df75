"""A checkpoint knows the base that it was made on."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from kilobayes import host
from kilobayes.errors import KilobayesError
from tests.host.test_adapters import Toy
from tests.host.tiny import batch, make


def saved(tmp_path, monkeypatch):
    monkeypatch.setattr(host.KilobayesConfig, "method", Toy())
    model = get_peft_model(make("bert"), host.KilobayesConfig(task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    return model


def test_another_base_is_refused_and_the_site_named(tmp_path, monkeypatch):
    saved(tmp_path, monkeypatch)
    path = tmp_path / "adapter_model.safetensors"
    held = load_file(path)
    key = next(k for k in held if k.endswith("fingerprint"))
    held[key] = (held[key].view(torch.float32) + 0.5).view(torch.int32)
    save_file(held, path, {"format": "pt"})
    with pytest.raises(KilobayesError, match=r"another base model.*query.*check value"):
        PeftModel.from_pretrained(make("bert"), tmp_path)


def test_rounding_is_no_other_base_and_old_files_have_no_number(tmp_path, monkeypatch):
    model = saved(tmp_path, monkeypatch)
    path = tmp_path / "adapter_model.safetensors"
    held = load_file(path)
    for key in [k for k in held if k.endswith("fingerprint")][1:]:
        del held[key]
    key = next(k for k in held if k.endswith("fingerprint"))
    held[key] = (held[key].view(torch.float32) + 1e-3).view(torch.int32)
    save_file(held, path, {"format": "pt"})
    again = PeftModel.from_pretrained(make("bert"), tmp_path).to(torch.bfloat16)
    inputs = batch("bert")
    assert torch.equal(again.float()(**inputs).logits, model.to(torch.bfloat16).float()(**inputs).logits)
    again.delete_adapter("default")
