"""Quantised bases on the CPU: bitsandbytes in 4 and 8 bits, torchao in 8."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForSequenceClassification, TorchAoConfig

from kilobayes import host
from kilobayes.adapters import LoRA
from kilobayes.errors import KilobayesError

from .tiny import batch, close, config, loop, repeated

# bitsandbytes says that it computes in 16 bits; torchao's own imports warn of each other.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*MatMul8bitLt.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
KINDS = ["bnb4", "bnb8", "torchao8"]
NEAR = {
    "bnb4": 1e-5,
    "bnb8": 2e-2,
    "torchao8": 1e-5,
}  # 8-bit activations are quantised by the batch that they are in
MERGED = {"bnb4": 0.3, "bnb8": 0.1, "torchao8": 0.05}  # merged weights are rounded to their few bits again


def quantisation(kind: str) -> Any:
    if kind == "torchao8":
        pytest.importorskip("torchao", reason="torchao is not installed")
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    if kind == "bnb8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A plain model on disk."""
    where = tmp_path_factory.mktemp("base")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(
            LlamaConfig(
                vocab_size=64,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_labels=3,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                use_cache=False,
                initializer_range=0.1,
            )
        )
    model.save_pretrained(where)
    return where


def load(kind: str, where, repack: bool = False) -> Any:
    model = LlamaForSequenceClassification.from_pretrained(
        where, quantization_config=quantisation(kind), device_map="cpu"
    )
    assert type(model.score) is torch.nn.Linear
    for module in model.modules():  # PEFT's own LoRA, the reference here, meets no repacked weights either
        if not repack and hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert type(weight).__name__ in ("Params4bit", "Int8Params", "Int8Tensor")
    return model.eval()


def adapted(kind: str, where, **options: Any) -> Any:
    return get_peft_model(load(kind, where), config("llama", **options)).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_stacks_on_a_quantised_base(kind, folder):
    model, inputs = adapted(kind, folder, stack=2), batch("llama")
    base = load(kind, folder)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, base(**inputs).logits)
    expected = loop(model, inputs, 2)
    zipped = model(**repeated(inputs, 2)).logits
    close(zipped, expected, NEAR[kind])
    with host.outer(model, 2):
        close(model(**inputs).logits, expected, NEAR[kind])
    zipped.square().sum().backward()
    for key, leaf in host.read(model).items():
        assert leaf.dtype == torch.float32
        assert torch.isfinite(leaf.grad).all(), key
        assert leaf.grad.flatten(1).abs().amax(1).min() > 0, key


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_dequantised_model(kind, folder):
    """The same adapter on a float32 model whose weights are the dequantised ones."""
    model, inputs = adapted(kind, folder), batch("llama")
    plain = get_peft_model(LlamaForSequenceClassification.from_pretrained(folder), config("llama")).eval()
    weights = {path: layer.dequantised() for path, layer in host.layers(model).items()}
    assert all(w.is_floating_point() and w.shape == (64, 64) for w in weights.values())
    everywhere = adapted(kind, folder, target_modules="all-linear")
    for path, layer in host.layers(everywhere).items():
        target = plain.get_base_model().get_submodule(path)
        target = getattr(target, "base_layer", target)
        target.weight.data = layer.dequantised().float()
    ours, theirs = model(**inputs).logits, plain(**inputs).logits
    close(ours, theirs, 3e-2 if kind == "bnb8" else 1e-4)
    ours.sum().backward()
    theirs.sum().backward()
    wanted = host.read(plain)
    for key, leaf in host.read(model).items():
        close(leaf.grad, wanted[key].grad, 0.15 if kind == "bnb8" else 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_saving_and_merging_over_a_quantised_base(kind, folder, tmp_path):
    model, inputs = adapted(kind, folder), batch("llama")
    logits = model(**inputs).logits
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(kind, folder), tmp_path / "adapter")
    assert torch.equal(again(**inputs).logits, logits)
    host.export_lora(model, tmp_path / "plain")
    plain = PeftModel.from_pretrained(load(kind, folder), tmp_path / "plain")
    close(plain(**inputs).logits, logits, NEAR[kind])
    merged = model.merge_and_unload()
    close(merged(**inputs).logits, logits, MERGED[kind])


def test_adopted_lora_on_a_quantised_base(folder):
    from peft import LoraConfig

    theirs, inputs = (
        get_peft_model(load("bnb4", folder), LoraConfig(r=4, task_type="SEQ_CLS")).eval(),
        batch("llama"),
    )
    for name, parameter in theirs.named_parameters():
        if ".lora_B." in name:
            parameter.data += 0.1
    expected = theirs(**inputs).logits
    model = host.adopt(theirs)
    assert host.method(model) == LoRA(r=4, alpha=8.0)
    close(model(**inputs).logits, expected)


def test_copies_of_quantised_models(folder):
    model, inputs = adapted("bnb4", folder), batch("llama")
    assert torch.equal(copy.deepcopy(model)(**inputs).logits, model(**inputs).logits)


def test_weights_that_bitsandbytes_repacks(folder):
    """On some CPUs it does at the first evaluation; then they dequantise wrongly and stop gradients."""
    base, inputs = load("bnb4", folder, repack=True), batch("llama")
    base.requires_grad_(False)
    model, fresh = get_peft_model(base, config("llama")).eval(), load("bnb4", folder, repack=True)
    fresh.requires_grad_(False)
    before = {path: layer.dequantised() for path, layer in host.layers(model).items()}
    with torch.no_grad():
        model(**inputs)
        fresh(**inputs)
    assert all(torch.equal(layer.dequantised(), before[path]) for path, layer in host.layers(model).items())
    state = fresh.model.layers[0].self_attn.q_proj.weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        pytest.skip("this CPU has no AVX512-BF16, so bitsandbytes repacks nothing")
    with pytest.raises(KilobayesError, match=r"repacked the weight of .*load the model again"):
        get_peft_model(fresh, config("llama"))
