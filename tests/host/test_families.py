"""Every family of models through an adapter's life: placed, stacked, trained, predicted, merged, saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from kilobayes import host, predict, train, tree
from kilobayes.errors import KilobayesError
from kilobayes.host import unpad
from kilobayes.host.answers import answers
from kilobayes.host.pairing import shared_prefix
from kilobayes.lm.decode import generate
from kilobayes.lm.sampling import Sampling
from kilobayes.posteriors import SWAG
from kilobayes.random import generator
from kilobayes.testing.tiny import TinyRows, TinyTask, nll
from tests.decoders import prompts, slowly

from .tiny import CAUSAL, CLASSIFIERS, EXPERTS, MORE, batch, close, config, hosted, loop, make, scores

S = 3
FAMILIES = CLASSIFIERS + MORE
# low rank, an operator, leaves that all sites share
ADAPTERS = ["LoRA(r=2)", "HydraLoRA(r=2, heads=2)", "VBLoRA(r=2, h=6, b=8, k=2)"]
ENCODER = (["query", "value"], ["dense", "key", "query", "value"])
DECODER = (["q_proj", "v_proj"],
           ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"])  # fmt: skip
# last parts of the names of what is adapted: by default, and with "all-linear"
PLACES: dict[str, tuple[list[str], list[str]]] = {
    "bert": ENCODER, "roberta": ENCODER, "xlm_roberta": ENCODER,
    "distilbert": (["q_lin", "v_lin"], ["k_lin", "lin1", "lin2", "out_lin", "q_lin", "v_lin"]),
    "albert": (["query", "value"],
               ["dense", "embedding_hidden_mapping_in", "ffn", "ffn_output", "key", "pooler", "query",
                "value"]),
    "deberta": (["query_proj", "value_proj"], ["dense", "key_proj", "query_proj", "value_proj"]),
    "deberta_conv": (["query_proj", "value_proj"],
                     ["dense", "key_proj", "pos_key_proj", "query_proj", "value_proj"]),
    "modernbert": (["Wqkv"], ["Wi", "Wo", "Wqkv", "dense"]),
    "gpt2": (["c_attn"], ["c_attn", "c_fc", "c_proj"]),
    "phi": (["fc1", "fc2", "q_proj", "v_proj"], ["dense", "fc1", "fc2", "k_proj", "q_proj", "v_proj"]),
    "phi3": (["qkv_proj"], ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]),
    "opt": (["q_proj", "v_proj"],
            ["fc1", "fc2", "k_proj", "out_proj", "project_in", "project_out", "q_proj", "v_proj"]),
    "t5": (["q", "v"], ["k", "o", "q", "v", "wi", "wo"]),
} | dict.fromkeys(["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3"], DECODER)  # fmt: skip
HEAD = {"t5": ["classification_head"]}  # what PEFT does not train by itself


def adapted(kind: str, adapter: str, stack: int = 1, **options: Any) -> Any:
    """A model under an adapter away from its start; its members differ, heads included."""
    base = kind.removesuffix("_lm")
    options = {"modules_to_save": HEAD.get(base)} | options
    model = hosted(kind, adapter=adapter, stack=stack, init_weights=True, **options)
    gen = torch.Generator().manual_seed(7)
    moved = {k: v.detach() + 0.1 * torch.randn(v.shape, generator=gen) for k, v in host.read(model).items()}
    host.write(model, moved)
    return model


def real(found: Tensor, mask: Tensor) -> Tensor:
    """Scores of tokens with zeros at padding; those of rows as they are."""
    return found * mask.repeat(len(found) // len(mask), 1)[..., None] if found.dim() == 3 else found


@pytest.mark.parametrize("kind", FAMILIES + CAUSAL)
def test_where_adapters_go(kind: str) -> None:
    base = kind.removesuffix("_lm")
    for targets, expected in zip((None, "all-linear"), PLACES[base], strict=True):
        model = hosted(kind, target_modules=targets, modules_to_save=HEAD.get(base))
        assert sorted({site.name.rpartition(".")[2] for site in host.sites(model)}) == expected
        assert bool(host.heads(model)) == (kind in FAMILIES)
        assert not host.uncovered(model)
        if targets is None:
            assert (shared_prefix(model) is not None) == (kind not in ("albert", "deberta_conv", "t5"))


@pytest.mark.parametrize("adapter", ADAPTERS, ids=["lora", "hydra", "vblora"])
@pytest.mark.parametrize("kind", FAMILIES + CAUSAL)
@torch.no_grad()
def test_a_stack_equals_its_members(kind: str, adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows to all members, with what they share computed once, and on real tokens alone."""
    monkeypatch.setattr(unpad, "LEAST_PADDING", 0.01)
    targets = "all-linear" if adapter == ADAPTERS[0] else None
    ways: list[dict[str, Any]] = [{"target_modules": targets}]
    if adapter == ADAPTERS[1] and kind not in ("albert", "t5"):  # whose blocks are one, or two lists
        default = PLACES[kind.removesuffix("_lm")][0]
        ways = [{"target_modules": default, "layers_to_transform": [2]}]
    for options in ways:
        model = adapted(kind, adapter, S, **options)
        for left in (False, True):
            inputs = batch(kind, left=left)
            mask = inputs["attention_mask"]
            expected = real(loop(model, inputs, S), mask)
            assert not torch.allclose(expected[:4], expected[4:8], atol=1e-4)
            with host.outer(model, S):
                close(real(scores(model(**inputs)), mask), expected)
                with host.real_tokens(model):
                    close(real(scores(model(**inputs)), mask), expected)


def lesson(kind: str) -> TinyRows:
    """Rows whose first token tells the label; T5's classifier reads the token that ends them."""
    ids = [[3 + token % 60 for token in row[1:-1]] + [1] * (kind == "t5") for row in TinyRows.make(16).ids]
    return TinyRows(ids, torch.tensor([row[0] % 3 for row in ids]))


@pytest.mark.parametrize("kind", FAMILIES)
def test_training_lowers_the_loss_and_predictions_follow(kind: str) -> None:
    rows = lesson(kind)
    model = get_peft_model(
        make(kind), config(kind, adapter="LoRA(r=4)", init_weights=True, modules_to_save=HEAD.get(kind))
    )
    start = tree.map_params(lambda v: v.repeat(2, *[1] * (v.dim() - 1)), tree.clone(host.read(model)))
    settings = train.Settings(lr=(1e-2, 2e-2), epochs=8, batch_size=8, seeds=(0, 1))
    posterior = SWAG(rank=2, start=0.5)
    with host.real_tokens(model):
        done = train.fit(model, rows, nll, posterior, start, settings)
    assert not done.diverged
    assert bool((done.losses[-4:].mean(dim=0) < 0.9 * done.losses[:2].mean(dim=0)).all())
    drawn = posterior.sample(done.state, S, generator(3))
    with torch.inference_mode():
        encoded: Any = rows
        found = predict.logits(model, drawn, TinyTask(), encoded, batch_size=5)
        with host.outer(model, S):
            host.install(model, host.build(model, drawn))
            whole = model(**rows.batch(torch.arange(16))[0]).logits.unflatten(0, (S, -1))
    close(found, whole, 2e-5)


@pytest.mark.parametrize("kind", FAMILIES + CAUSAL)
@torch.no_grad()
def test_saved_merged_and_taken_off(kind: str, tmp_path: Any) -> None:
    inputs = batch(kind, left=True)
    for adapter in ADAPTERS:
        model = adapted(kind, adapter)
        before = scores(model(**inputs))
        model.save_pretrained(tmp_path / adapter)
        back = PeftModel.from_pretrained(make(kind), tmp_path / adapter).eval()
        assert torch.equal(scores(back(**inputs)), before)
        assert not tree.first_difference(host.read(back), host.read(model))
        with model.disable_adapter():
            close(scores(model(**inputs)), scores(make(kind)(**inputs)), 1e-6)
        if adapter == ADAPTERS[1]:  # which routes tokens
            with pytest.raises(KilobayesError, match="not a linear map"):
                model.merge_and_unload()
        else:
            close(scores(model.merge_and_unload()(**inputs)), before, 1e-4)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("kind", CAUSAL)
@torch.no_grad()
def test_answers_are_entries_of_all_scores(kind: str, left: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpad, "LEAST_PADDING", 0.01)
    model, inputs = adapted(kind, ADAPTERS[0], S), batch(kind, left=left)
    ends = (inputs["attention_mask"] * torch.arange(1, 8)).argmax(dim=1).repeat(S)
    with host.outer(model, S):
        whole = model(**inputs).logits
        with answers(model, [9, 4, 50]):
            found = model(**inputs).logits
            with host.real_tokens(model):
                close(model(**inputs).logits, found)
    close(found, whole[torch.arange(4 * S), ends][:, [9, 4, 50]])
    if kind in ("gemma2_lm", "gemma3_lm"):
        assert 1.0 < float(whole.abs().max()) <= 2.0  # the cap is felt


@pytest.mark.parametrize("kind", CAUSAL)
@torch.no_grad()
def test_a_decoder_writes_with_its_cache(kind: str) -> None:
    model = adapted(kind, ADAPTERS[0], 2)
    theta = tree.clone(host.read(model))
    ids, mask = prompts(6, 3)
    short = Sampling(max_new_tokens=4)
    found, expected = generate(model, theta, ids, mask, short), slowly(model, theta, ids, mask, short)
    assert [g.tokens for g in found] == [e["tokens"] for e in expected]
    host.write(model, tree.member(theta, 0))
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    theirs = model.generate(input_ids=ids, attention_mask=mask, use_cache=True, **options)[:, 6:]
    alone = generate(model, tree.member(theta, 0), ids, mask, short)
    assert theirs.tolist() == [g.tokens for g in alone]


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_are_refused_and_what_is_around_them_is_not(kind: str) -> None:
    for target, message in (("experts", "mixture of experts.*attention"), ("gate", "not a linear layer")):
        with pytest.raises(KilobayesError, match=message):
            get_peft_model(make(kind), config(kind, target_modules=[target]))
    model, inputs = hosted(kind, stack=S, target_modules="all-linear"), batch(kind)
    assert not any(".experts." in site.name for site in host.sites(model))
    assert shared_prefix(model) is not None
    with torch.no_grad(), host.outer(model, S):
        together = model(**inputs).logits
    close(together, loop(model, inputs, S))


def test_what_is_trained_whole_is_not_adapted_too() -> None:
    with pytest.raises(KilobayesError, match="pre_classifier is in modules_to_save"):
        get_peft_model(make("distilbert"), config("distilbert", target_modules=["pre_classifier"]))
    model = hosted("bert", target_modules="all-linear", modules_to_save=["pooler"], stack=2)
    assert sorted(host.heads(model)) == ["bert.pooler.dense", "classifier"]
    assert "bert.pooler.dense" not in [site.name for site in host.sites(model)]
