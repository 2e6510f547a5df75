"""Adopted LoRA gives the logits that it gave under PEFT."""

from __future__ import annotations

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, VeraConfig, get_peft_model

from kilobayes import host, tree
from kilobayes.adapters import LoRA
from kilobayes.errors import KilobayesError
from kilobayes.host import KilobayesConfig

from .test_export import KINDS
from .tiny import TASK, batch, close, hosted, make, scores


def trained(kind, **options):
    """A model with a PEFT LoRA that is not at its start."""
    options = {"r": 4, "task_type": TASK.get(kind, "SEQ_CLS"), "fan_in_fan_out": "gpt2" in kind} | options
    model = get_peft_model(make(kind), LoraConfig(**options)).eval()
    gen = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=gen)
    return model


LORAS = [
    {},
    {"lora_alpha": 3, "use_rslora": True, "lora_dropout": 0.1},
    {
        "rank_pattern": {"layer.1.attention.self.query": 6, "value": 2},
        "alpha_pattern": {"value": 5},
        "lora_alpha": 7,
    },
    {"bias": "lora_only"},
    {"target_modules": "all-linear"},
    {
        "target_modules": ["query", "dense"],
        "layers_to_transform": [1, 2],
        "exclude_modules": ["output.dense"],
    },
    {"modules_to_save": ["pooler"]},
]


@pytest.mark.parametrize(
    ("kind", "options"),
    [("bert", o) for o in LORAS]
    + [(k, {"target_modules": ["q_lin"]} if k == "distilbert" else {}) for k in KINDS[1:]]
    + [("bert", {"modules_to_save": ["LayerNorm"]})],
)
def test_adopted_loras_give_the_same_logits(kind, options, tmp_path):
    theirs, inputs, base = trained(kind, **options), batch(kind), make(kind).state_dict()
    expected = scores(theirs(**inputs))
    model = host.adopt(theirs)
    assert isinstance(model.peft_config["default"], KilobayesConfig)
    close(scores(model(**inputs)), expected, 1e-6)
    assert tree.size(host.read(model)) == 1
    if "bias" not in options:
        for key, value in host.without_adapter(model):
            assert torch.equal(value, base[key]), key
    model.save_pretrained(tmp_path / "ours")
    close(scores(PeftModel.from_pretrained(make(kind), tmp_path / "ours")(**inputs)), expected, 1e-6)
    host.export_lora(model, tmp_path / "plain")
    close(scores(PeftModel.from_pretrained(make(kind), tmp_path / "plain")(**inputs)), expected, 1e-6)


def test_adopted_loras_keep_their_options_and_train(tmp_path):
    theirs = trained("roberta", r=3, lora_alpha=5, use_rslora=True, lora_dropout=0.2)
    theirs.save_pretrained(tmp_path)
    loaded = host.adopt(PeftModel.from_pretrained(make("roberta"), tmp_path, adapter_name="mine"))
    assert (host.active(loaded), host.method(loaded)) == (
        "mine",
        LoRA(r=3, alpha=5.0, rslora=True, dropout=0.2),
    )
    assert not any(p.requires_grad for p in loaded.parameters())
    model = host.adopt(theirs.train())
    assert model.training
    assert all(p.requires_grad for p in host.read(model).values())


def test_padded_ranks_stay_zero_under_gradients():
    model = host.adopt(trained("bert", rank_pattern={"value": 2}))
    model(**batch("bert")).logits.square().sum().backward()
    for key, leaf in host.read(model).items():
        if "value" in key:
            padded = (leaf, leaf.grad) if key.endswith("A") else (leaf.mT, leaf.grad.mT)
            assert all(torch.equal(t[:, 2:], torch.zeros_like(t[:, 2:])) for t in padded)
            assert padded[1][:, :2].abs().max() > 0


def two_adapters():
    model = trained("bert")
    model.add_adapter("more", LoraConfig(r=2, task_type="SEQ_CLS"))
    return model


def merged():
    model = trained("bert")
    model.merge_adapter()
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: make("bert"), r"only a PeftModel.*BertForSequence"),
        (lambda: trained("bert", use_dora=True), r"only plain LoRA.*use_dora"),
        (lambda: trained("bert", init_lora_weights="olora"), r"changed the base.*olora.*path_initial_model"),
        (lambda: get_peft_model(make("bert"), VeraConfig(r=4, task_type="SEQ_CLS")), r"only LoRA.*VERA"),
        (lambda: hosted("bert"), r"only LoRA.*KILOBAYES"),
        (lambda: trained("bert", lora_bias=True), r"bias of its own"),
        (lambda: trained("bert", target_modules=["query", "word_embeddings"]), r"Embedding"),
        (two_adapters, r"default, more.*delete_adapter"),
        (merged, r"merged.*unmerge_adapter"),
    ],
)
def test_what_is_no_plain_lora_is_not_adopted(build, message):
    model = build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(KilobayesError, match=message):
        host.adopt(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_autoclasses_read_what_an_adopted_model_saves(tmp_path):
    make("bert").save_pretrained(tmp_path / "base")
    base = type(make("bert")).from_pretrained(tmp_path / "base")
    model = host.adopt(get_peft_model(base, LoraConfig(task_type="SEQ_CLS")).eval())
    model.save_pretrained(tmp_path / "adapter")
    again, inputs = (
        AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter"),
        batch("bert"),
    )
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
