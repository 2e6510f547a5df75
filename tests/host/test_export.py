"""Out of the host: plain LoRA and merged models give the same logits."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from kilobayes import host, tree
from kilobayes.adapters import LoRA
from kilobayes.errors import KilobayesError

from .tiny import batch, close, config, hosted, make, scores

KINDS = ["bert", "roberta", "distilbert", "deberta", "gpt2", "gpt2_lm", "llama", "llama_lm", "t5_seq2seq"]


@pytest.mark.parametrize("kind", KINDS)
def test_exported_lora_gives_the_same_logits(kind, tmp_path):
    model, inputs = hosted(kind, adapter=LoRA(r=4, alpha=3.0)), batch(kind)
    expected = scores(model(**inputs))
    assert host.export_lora(model, tmp_path / "plain") == tmp_path / "plain"
    plain = PeftModel.from_pretrained(make(kind), tmp_path / "plain")
    written = plain.peft_config["default"]
    assert (type(written), written.r, written.lora_alpha, written.rank_pattern) == (LoraConfig, 4, 4, {})
    close(scores(plain(**inputs)), expected, 1e-6)
    close(scores(plain.merge_and_unload()(**inputs)), expected)
    assert torch.equal(scores(model(**inputs)), expected)


def unequal():
    """A hosted model whose first layer has another rank than the rest."""
    model = hosted("bert", modules_to_save=["pooler"])
    leaves = next(iter(host.layers(model).values())).kilobayes_leaves["default"]
    leaves["A"] = torch.nn.Parameter(leaves["A"][:, :2].detach())
    leaves["B"] = torch.nn.Parameter(leaves["B"][:, :, :2].detach())
    return model


def test_exported_lora_loads_in_a_process_without_kilobayes(tmp_path):
    script = """
import sys, warnings
from pathlib import Path
import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
for folder in sorted(Path(sys.argv[1]).iterdir()):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = AutoPeftModelForSequenceClassification.from_pretrained(folder / "adapter")
    odd = [str(w.message) for w in caught if "missing" in str(w.message).lower()]
    assert not odd, odd
    logits = model.eval()(**load_file(folder / "inputs.safetensors")).logits.detach()
    save_file({"logits": logits.contiguous()}, folder / "logits.safetensors")
assert not any(name.partition(".")[0] == "kilobayes" for name in sys.modules)
"""
    models = {"bert": unequal(), "roberta": hosted("roberta"), "gpt2": hosted("gpt2")}
    for kind, model in models.items():
        make(kind).save_pretrained(tmp_path / "all" / kind / "base")
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "all" / kind / "base")
        host.export_lora(model, tmp_path / "all" / kind / "adapter")
        save_file(batch(kind), tmp_path / "all" / kind / "inputs.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "all")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for kind, model in models.items():
        logits = load_file(tmp_path / "all" / kind / "logits.safetensors")["logits"]
        close(logits, model(**batch(kind)).logits, 1e-6)
    written = json.loads((tmp_path / "all" / "bert" / "adapter" / "adapter_config.json").read_text())
    first = "bert.encoder.layer.0.attention.self.query"
    assert written["rank_pattern"] == written["alpha_pattern"] == {first: 2}
    assert json.loads((tmp_path / "all" / "gpt2" / "adapter" / "adapter_config.json").read_text())[
        "fan_in_fan_out"
    ]


def test_export_names_the_adapter_and_keeps_trained_biases(tmp_path):
    model, inputs = hosted("bert", bias="all"), batch("bert")
    with torch.no_grad():
        for name in host.uncovered(model):
            model.get_base_model().get_parameter(name).add_(0.3)
    host.export_lora(model, tmp_path / "biases")
    close(
        PeftModel.from_pretrained(make("bert"), tmp_path / "biases")(**inputs).logits,
        model(**inputs).logits,
        1e-6,
    )
    model = hosted("bert")
    model.add_adapter("second", config("bert", adapter=LoRA(r=2), seed=9))
    host.export_lora(model, tmp_path / "second", "second")
    model.set_adapter("second")
    plain = PeftModel.from_pretrained(make("bert"), tmp_path / "second")
    close(plain(**inputs).logits, model(**inputs).logits, 1e-6)


@dataclass(frozen=True, eq=False)
class Scaled:
    """``x -> s x``: an operator that is not of low rank."""

    s: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.s


class Scale:
    def build(self, params, constants, site):
        return Scaled(params["A"][:, :1, :1])


def test_what_is_no_lora_is_not_exported(tmp_path):
    stacked = hosted("bert", stack=3)
    for export in (host.export_lora, host.export_merged):
        with pytest.raises(KilobayesError, match=r"stack of 3.*write one member first"):
            export(stacked, tmp_path / "no")
    host.write(stacked, tree.member(host.read(stacked), 2))
    host.export_lora(stacked, tmp_path / "one")
    model = hosted("bert")
    next(iter(host.layers(model).values())).methods["default"] = Scale()
    with pytest.raises(KilobayesError, match=r"not of low rank.*Scaled.*export_merged"):
        host.export_lora(model, tmp_path / "no")
    assert not (tmp_path / "no").exists()
    before = model(**batch("bert")).logits
    host.export_merged(model, tmp_path / "whole")
    close(type(make("bert")).from_pretrained(tmp_path / "whole")(**batch("bert")).logits, before)


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "llama_lm", "t5_seq2seq"])
def test_exported_merged_models_give_the_same_logits(kind, tmp_path):
    model, inputs = hosted(kind), batch(kind)
    expected, before = scores(model(**inputs)), {k: v.clone() for k, v in model.state_dict().items()}
    host.export_merged(model, tmp_path)
    close(scores(type(make(kind)).from_pretrained(tmp_path)(**inputs)), expected)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert torch.equal(scores(model(**inputs)), expected)
