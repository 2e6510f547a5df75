"""Every adapter as a method of PEFT: saved, merged, several at once, off, on few bits, GPT-2, in trainers."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

from kilobayes import host, spec, tree
from kilobayes.catalog import catalog
from kilobayes.errors import KilobayesError
from kilobayes.types import LowRank

from .test_training import Rows, arguments
from .tiny import batch, close, config, make

ADAPTERS = [name for name in catalog("adapters") if name != "LoRA"]  # which other tests take to pieces
KINDS = ["bert", "roberta", "gpt2", "llama"]


def hosted(name: str, kind: str = "bert", base=None, **options):
    """An adapter away from its start, in evaluation mode."""
    model = get_peft_model(
        base or make(kind), config(kind, adapter=name, init_weights=True, **options)
    ).eval()
    gen = torch.Generator().manual_seed(5)
    theta = tree.map_params(
        lambda t: t.detach() + 0.05 * torch.randn(t.shape, generator=gen), host.read(model)
    )
    host.write(model, theta)
    return model


def linear(model) -> bool:
    """Whether its updates are matrices."""
    return all(
        not getattr(layer.operator("default"), "nonlinear", "") for layer in host.layers(model).values()
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_saved_merged_and_switched_off(name, kind, tmp_path):
    model, inputs = hosted(name, kind), batch(kind)
    before = model(**inputs).logits
    model.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(make(kind), tmp_path)
    assert not tree.first_difference(host.read(back), host.read(model))
    close(back(**inputs).logits, before, 1e-5)  # decompositions of the base may differ in their last bits
    with model.disable_adapter():
        off = model(**inputs).logits
    base = make(kind)
    close(off, base(**inputs).logits, 1e-6)
    if not linear(model):
        with pytest.raises(KilobayesError, match="not a linear map"):
            model.merge_and_unload()
        assert torch.equal(model(**inputs).logits, before)
        return
    host.export_merged(model, tmp_path / "merged")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    close(plain(**inputs).logits, before, 1e-4)
    if all(isinstance(layer.operator("default"), LowRank) for layer in host.layers(model).values()):
        host.export_lora(model, tmp_path / "lora")
        close(PeftModel.from_pretrained(make(kind), tmp_path / "lora").eval()(**inputs).logits, before, 1e-5)


@pytest.mark.parametrize("name", ADAPTERS)
def test_beside_another_on_one_model(name):
    inputs = batch("bert")
    alone = {other: hosted(other)(**inputs).logits for other in (name, "LoRA")}
    model = hosted(name)
    model.add_adapter("second", config("bert", adapter="LoRA", init_weights=True))
    host.write(model, {k: v.detach() for k, v in host.read(hosted("LoRA")).items()}, "second")
    close(model(**inputs).logits, alone[name], 1e-6)
    model.set_adapter("second")
    close(model(**inputs).logits, alone["LoRA"], 1e-6)
    model.delete_adapter("default")
    close(model(**inputs).logits, alone["LoRA"], 1e-6)


@pytest.mark.parametrize("name", ADAPTERS)
def test_on_a_half_precision_base(name):
    whole, half = hosted(name), hosted(name, base=make("bert").to(torch.bfloat16))
    assert all(v.dtype == torch.float32 for v in host.read(half).values())
    found = half(**batch("bert")).logits
    assert found.dtype == torch.bfloat16
    close(found.float(), whole(**batch("bert")).logits, 0.2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ADAPTERS)
def test_on_a_base_of_four_bits(name, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    make("llama").save_pretrained(tmp_path)
    few = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=few)
    model, inputs = hosted(name, "llama", base.eval()), batch("llama")
    out = model(**inputs).logits
    with model.disable_adapter():
        off = model(**inputs).logits
    assert bool(torch.isfinite(out).all())
    assert (out - off).abs().max() > 1e-4
    out.square().sum().backward()
    assert all(v.grad is not None for v in host.read(model).values())


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_decoder_generates_with_its_cache(name):
    model = hosted(name, "llama_lm")
    prompt = {
        "input_ids": torch.tensor([[5, 9, 33, 4]]),
        "attention_mask": torch.ones(1, 4, dtype=torch.int64),
    }
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        found = model.generate(**prompt, **options, use_cache=True)
        expected = prompt["input_ids"]
        for _ in range(6):
            following = model(input_ids=expected).logits[:, -1:].argmax(-1)
            expected = torch.cat([expected, following], dim=1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ADAPTERS)
def test_in_anothers_trainer(name, tmp_path):
    from transformers import Trainer

    torch.manual_seed(0)
    model = get_peft_model(make("bert"), config("bert", adapter=name, init_weights=True))
    trainer = Trainer(model, arguments(tmp_path), train_dataset=Rows(64))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "saved"))
    back = PeftModel.from_pretrained(make("bert"), tmp_path / "saved")
    odd = tree.first_difference(host.read(back), host.read(model))
    assert not odd


@pytest.mark.parametrize("name", ADAPTERS)
def test_no_global_random_numbers(name):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    method, sites = spec.adapter(name), host.sites(get_peft_model(make("bert"), config("bert")))
    torch.set_rng_state(before)
    host.initial(method, sites, [1, 2])
    assert torch.equal(torch.get_rng_state(), before)
