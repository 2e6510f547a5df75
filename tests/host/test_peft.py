"""A hosted model is an ordinary PeftModel: saving, loading, merging, switching, refusing."""

from __future__ import annotations

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from safetensors.torch import load_file

from kilobayes import host, tree
from kilobayes.adapters import LoRA
from kilobayes.errors import KilobayesError
from kilobayes.host import KilobayesConfig

from .tiny import batch, close, config, hosted, make, repeated, same, scores, state


def test_training_starts_at_the_base_and_counts_parameters(capsys):
    base, inputs = make("bert"), batch("bert")
    before = base(**inputs).logits
    model = get_peft_model(base, KilobayesConfig(adapter=LoRA(r=4), task_type="SEQ_CLS"))
    close(model.eval()(**inputs).logits, before, 1e-6)
    model.print_trainable_parameters()
    count = 6 * 4 * (32 + 32) + 32 * 3 + 3
    assert f"trainable params: {count:,} " in capsys.readouterr().out
    assert sum(v.numel() for v in host.read(model).values()) == count
    assert host.uncovered(model) == []


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("stack", [1, 3])
@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "gpt2", "llama_lm", "t5_seq2seq"])
def test_saved_and_loaded_models_agree(kind, stack, low, tmp_path):
    model = hosted(kind, stack=stack)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(kind), tmp_path, low_cpu_mem_usage=low)
    inputs = repeated(batch(kind), stack)
    same(host.read(model), host.read(again))
    assert torch.equal(scores(again(**inputs)), scores(model(**inputs)))
    assert repr(host.method(again)) == "LoRA(r=4, alpha=None, rslora=False, dropout=0.0)"
    assert not any(p.requires_grad for p in again.parameters())
    trainable = PeftModel.from_pretrained(make(kind), tmp_path, is_trainable=True)
    assert all(p.requires_grad for p in host.read(trainable).values())


def test_auto_classes_find_the_base(tmp_path):
    for kind, auto in (
        ("bert", AutoPeftModelForSequenceClassification),
        ("llama_lm", AutoPeftModelForCausalLM),
    ):
        folder = tmp_path / kind
        make(kind).save_pretrained(folder / "base")
        base = type(make(kind)).from_pretrained(folder / "base")
        model = get_peft_model(base, config(kind, stack=2)).eval()
        model.save_pretrained(folder / "adapter")
        again = auto.from_pretrained(folder / "adapter")
        inputs = repeated(batch(kind), 2)
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
        assert isinstance(PeftConfig.from_pretrained(folder / "adapter"), KilobayesConfig)


def test_checkpoints_hold_the_adapter_alone(tmp_path):
    hosted("roberta", stack=2).save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert held["base_model.model.classifier.dense.weight"].shape == (2, 32, 32)
    key = "base_model.model.roberta.encoder.layer.0.attention.self.query.kilobayes_leaves.A"
    assert held[key].shape == (2, 4, 32)
    assert len(held) == 6 * 2 + 4


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "llama_lm", "deberta", "t5", "bert_model"])
def test_merged_equals_unmerged(kind):
    model, inputs = hosted(kind), batch(kind)
    expected, base = scores(model(**inputs)), state(make(kind))
    model.merge_adapter(safe_merge=True)
    close(scores(model(**inputs)), expected)
    with model.disable_adapter():  # unmerges
        close(scores(model(**inputs)), scores(make(kind)(**inputs)))
    model.merge_adapter()
    model.unmerge_adapter()
    close(scores(model(**inputs)), expected)
    for key, tensor in host.without_adapter(model):
        close(tensor, base[key], 1e-6)
    merged = model.merge_and_unload()
    close(scores(merged(**inputs)), expected)
    assert list(merged.state_dict()) == list(base)
    assert {type(m) for m in merged.modules()} == {type(m) for m in make(kind).modules()}


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "deberta"])
@pytest.mark.parametrize("stack", [1, 2])
def test_unload_and_disable_give_the_base_bit_for_bit(kind, stack):
    base = make(kind)
    model, inputs = hosted(kind, stack=stack), batch(kind)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, base(**inputs).logits)
    same(dict(host.without_adapter(model)), base.state_dict())
    bare = model.unload()
    same(bare.state_dict(), base.state_dict())
    assert torch.equal(bare(**inputs).logits, base(**inputs).logits)
    assert torch.equal(
        get_peft_model(bare, config(kind))(**inputs).logits,
        get_peft_model(base, config(kind))(**inputs).logits,
    )


def test_a_stack_does_not_merge_and_says_what_to_do():
    model, inputs = hosted("roberta", stack=3), batch("roberta")
    with host.outer(model, 3):
        expected = host.check_rows(model(**inputs).logits, 3, 4)[1]
    before = state(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(KilobayesError, match=r"stack of 3.*write one member first"):
            merge()
    same(state(model), before)
    host.write(model, tree.member(host.read(model), 1))
    assert model.peft_config["default"].stack == 1
    close(model.merge_and_unload()(**inputs).logits, expected)


def test_nan_is_not_merged_safely():
    model = hosted("bert")
    theta = tree.clone(host.read(model))
    theta[next(iter(theta))][:] = float("nan")
    host.write(model, theta)
    with pytest.raises(KilobayesError, match="not finite"):
        model.merge_adapter(safe_merge=True)


def test_several_adapters_of_different_rank_and_stack():
    model, inputs = hosted("bert"), batch("bert", rows=6)
    first = model(**inputs).logits
    model.add_adapter(
        "wide", config("bert", adapter=LoRA(r=6), stack=3, seed=4, target_modules=["key", "query"])
    )
    assert torch.equal(model(**inputs).logits, first)
    assert all(p.requires_grad for p in host.read(model, "default").values())
    assert not any(p.requires_grad for p in host.read(model, "wide").values())
    model.set_adapter("wide")
    assert host.active(model) == "wide"
    assert all(p.requires_grad for p in host.read(model).values())
    assert not any(p.requires_grad for p in host.read(model, "default").values())
    assert host.method(model).r == 6
    wide = model(**inputs).logits
    alone = hosted("bert", adapter=LoRA(r=6), stack=3, seed=4, target_modules=["key", "query"])
    host.write(alone, host.read(model, "wide"))
    assert torch.equal(wide, alone(**inputs).logits)
    with pytest.raises(KilobayesError, match=r"no adapter called 'wid'.*did you mean wide"):
        host.read(model, "wid")
    model.set_adapter("default")
    assert torch.equal(model(**inputs).logits, first)
    model.delete_adapter("wide")
    assert not any(
        "wide" in layer.methods or "wide" in layer.constants for layer in host.layers(model).values()
    )
    assert torch.equal(model(**inputs).logits, first)
    with pytest.raises(AttributeError):
        model.add_weighted_adapter(["default"], [1.0], "sum")


def test_adding_an_adapter_leaves_what_was_frozen_frozen():
    model = hosted("bert")
    frozen = next(iter(host.read(model).values()))
    frozen.requires_grad_(False)
    model.add_adapter("other", config("bert"))
    assert not frozen.requires_grad
    assert sum(not p.requires_grad for p in host.read(model, "default").values()) == 1


def test_mixed_batches_by_name_are_refused_not_ignored():
    model = hosted("bert")
    model.add_adapter("other", config("bert"))
    with pytest.raises(KilobayesError, match="one stack"):
        model(**batch("bert"), adapter_names=["default", "other", "default", "other"])


@pytest.mark.parametrize("low", [False, True])
def test_half_precision_bases_keep_float32_adapters(low, tmp_path):
    base, inputs = make("bert").bfloat16(), batch("bert")
    model = get_peft_model(base, config("bert")).eval()
    assert {p.dtype for p in host.read(model).values()} == {torch.float32}
    logits = model(**inputs).logits
    assert logits.dtype == torch.bfloat16
    close(logits.float(), get_peft_model(make("bert"), config("bert")).eval()(**inputs).logits, 0.05)
    logits.float().sum().backward()
    assert {p.grad.dtype for p in host.read(model).values()} == {torch.float32}
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make("bert").bfloat16(), tmp_path, low_cpu_mem_usage=low)
    same(host.read(again), host.read(model))
    assert torch.equal(again(**inputs).logits, logits)
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}


def test_half_precision_adapters_on_request():
    model = get_peft_model(make("roberta").bfloat16(), config("roberta"), autocast_adapter_dtype=False).eval()
    assert {p.dtype for p in host.read(model).values()} == {torch.bfloat16}
    assert model(**batch("roberta")).logits.dtype == torch.bfloat16


def test_native_adapters_of_transformers(tmp_path):
    model, inputs = make("bert"), batch("bert", rows=6)
    before = model(**inputs).logits
    model.add_adapter(config("bert", stack=2, task_type=None), "mine")
    expected = model(**inputs).logits
    assert not torch.allclose(expected, before)
    assert host.active(model) == "mine"
    model.save_pretrained(tmp_path)
    model.disable_adapters()
    assert torch.equal(model(**inputs).logits, before)
    again = make("bert")
    again.load_adapter(tmp_path)
    assert torch.equal(again(**inputs).logits, expected)
