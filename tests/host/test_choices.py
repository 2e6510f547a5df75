"""Which modules are adapted, and what is refused before anything is touched."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertModel

from kilobayes import host
from kilobayes.errors import KilobayesError
from kilobayes.host import KilobayesConfig

from .tiny import CLASSIFIERS, OTHERS, TASK, batch, config, hosted, make, same, state


@pytest.mark.parametrize(
    "kind", [k for k in CLASSIFIERS + OTHERS if k not in ("albert", "distilbert", "modernbert", "mixtral_lm")]
)
def test_default_targets_are_those_of_lora(kind):
    ours = get_peft_model(make(kind), KilobayesConfig(task_type=TASK.get(kind, "SEQ_CLS")))
    theirs = get_peft_model(
        make(kind), LoraConfig(task_type=TASK.get(kind, "SEQ_CLS"), fan_in_fan_out="gpt2" in kind)
    )
    assert sorted(s.name for s in host.sites(ours)) == sorted(theirs.base_model.targeted_module_names)
    assert ours.peft_config["default"].target_modules == theirs.peft_config["default"].target_modules


@pytest.mark.parametrize(
    ("kind", "names"), [("albert", ["query", "value"]), ("distilbert", ["q_lin", "v_lin"])]
)
def test_default_targets_where_peft_has_none(kind, names):
    model = get_peft_model(make(kind), KilobayesConfig(task_type="SEQ_CLS"))
    assert sorted({s.name.rpartition(".")[2] for s in host.sites(model)}) == names


@pytest.mark.parametrize(
    ("options", "suffixes", "count"),
    [
        ({"target_modules": ["query"]}, {"query"}, 3),
        ({"target_modules": r".*layer\.[01]\..*(key|value)"}, {"key", "value"}, 4),
        ({"target_modules": "all-linear"}, {"query", "key", "value", "dense"}, 19),
        ({"target_modules": ["query", "value"], "layers_to_transform": [2]}, {"query", "value"}, 2),
        ({"target_modules": ["query"], "layers_to_transform": 0, "layers_pattern": "layer"}, {"query"}, 1),
        ({"target_modules": "all-linear", "exclude_modules": ["dense"]}, {"query", "key", "value"}, 9),
        ({"modules_to_save": ["pooler"]}, {"query", "value"}, 6),
    ],
)
def test_choice_of_modules(options, suffixes, count, tmp_path):
    model = hosted("bert", stack=2, **options)
    names = [s.name for s in host.sites(model)]
    assert ({n.rpartition(".")[2] for n in names}, len(names)) == (suffixes, count)
    assert list(host.heads(model)) == (["bert.pooler.dense"] if "modules_to_save" in options else []) + [
        "classifier"
    ]
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make("bert"), tmp_path)
    inputs = batch("bert")
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_trained_biases(tmp_path):
    model = hosted("bert", bias="kilobayes_only")
    names = host.uncovered(model)
    assert len(names) == 6
    assert all(n.endswith("base_layer.bias") for n in names)
    with torch.no_grad():
        for name in names:
            model.get_base_model().get_parameter(name).add_(0.5)
    model.save_pretrained(tmp_path)
    again, inputs = PeftModel.from_pretrained(make("bert"), tmp_path), batch("bert")
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def refusals():
    yield "bert", {"target_modules": ["query", "valeu"]}, r"'valeu' is not in the model.*did you mean value\?"
    yield (
        "bert",
        {"target_modules": ["query", "word_embeddings"]},
        r"word_embeddings cannot be adapted.*Embedding",
    )
    yield "bert", {"target_modules": ["attention"]}, r"BertAttention, not a linear layer"
    yield (
        "llama_lm",
        {"target_modules": ["lm_head"], "tie": True},
        r"lm_head.*shares its weight with model.embed_tok",
    )
    yield "bert", {"modules_to_save": ["LayerNorm"], "stack": 2}, r"LayerNorm cannot be stacked.*take stack=1"


@pytest.mark.parametrize(("kind", "options", "message"), list(refusals()))
def test_bad_choices_are_refused_and_leave_the_model_alone(kind, options, message):
    base = make(kind)
    if options.pop("tie", False):
        base.lm_head.weight = base.model.embed_tokens.weight
    before, modules = state(base), [type(m) for m in base.modules()]
    with pytest.raises(KilobayesError, match=message):
        get_peft_model(base, config(kind, **options))
    same(state(base), before)
    assert [type(m) for m in base.modules()] == modules


def test_experts_are_refused_and_the_attention_around_them_is_not():
    with pytest.raises(KilobayesError, match=r"experts belongs to a mixture of experts.*attention"):
        get_peft_model(make("mixtral_lm"), config("mixtral_lm", target_modules=["experts"]))
    with pytest.raises(KilobayesError, match=r"Router, not a linear layer.*q_proj"):
        get_peft_model(make("mixtral_lm"), config("mixtral_lm", target_modules=["gate"]))
    model = get_peft_model(make("mixtral_lm"), config("mixtral_lm", target_modules="all-linear"))
    assert {s.name.rpartition(".")[2] for s in host.sites(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_attention_that_reads_weights_directly_is_refused():
    model = torch.nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(KilobayesError, match="out_proj cannot be adapted"):
        get_peft_model(model, KilobayesConfig(target_modules=["out_proj"]))


def test_unknown_architectures_get_a_list_of_names():
    class Novel(BertConfig):
        model_type = "novel"

    model = BertModel(Novel(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(KilobayesError, match=r"'novel'.*dense, key, query, value.*all-linear"):
        get_peft_model(model, KilobayesConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stack": 0}, "at least 1"),
        ({"bias": "lora_only"}, "kilobayes_only"),
        ({"bias": "all", "stack": 2}, "shared by all members"),
        ({"target_modules": "all-linear", "layers_to_transform": 0}, "list of names"),
        ({"layers_pattern": "layer"}, "layers_to_transform is None"),
        ({"adapter": "LoRa(r=2)"}, "did you mean LoRA"),
    ],
)
def test_configurations_that_contradict_themselves(options, message):
    with pytest.raises(KilobayesError, match=message):
        KilobayesConfig(**options)
