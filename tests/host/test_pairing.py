"""Stacks against their members run one by one: outputs and gradients, both pairings, every architecture."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch.func import functional_call, vmap

from kilobayes import host, tree
from kilobayes.adapters import LoRA
from kilobayes.errors import KilobayesError
from kilobayes.host.pairing import shared_prefix

from .tiny import CLASSIFIERS, OTHERS, batch, close, config, gradients, hosted, loop, make, repeated, scores

S = 3
LAST = {"albert": [0], "t5": [1], "t5_encoder": [1], "t5_seq2seq": [1]}
SHARES = {
    "bert",
    "roberta",
    "distilbert",
    "deberta",
    "modernbert",
    "gpt2",
    "llama",
    "qwen2",
    "opt",
    "t5_encoder",
}
SHARES |= {"gpt2_lm", "llama_lm", "mixtral_lm", "bert_model"}


def compare(model, logits, expected) -> None:
    close(logits, expected)
    ours, theirs = gradients(model, logits), gradients(model, expected)
    for key in ours:
        close(ours[key], theirs[key])


@pytest.mark.parametrize("kind", CLASSIFIERS + OTHERS)
def test_zip_equals_the_members_apart(kind):
    model, inputs = hosted(kind, stack=S), batch(kind)
    expected = loop(model, inputs, S)
    compare(model, scores(model(**repeated(inputs, S))), expected)
    assert not torch.allclose(expected[:4], expected[4:8])


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("kind", CLASSIFIERS + OTHERS)
def test_outer_equals_the_members_apart(kind, left):
    model, inputs = hosted(kind, stack=S), batch(kind, left=left)
    assert (shared_prefix(model) is not None) == (kind in SHARES)
    expected = loop(model, inputs, S)
    with host.outer(model, S):
        logits = scores(model(**inputs))
    compare(model, logits, expected)


@pytest.mark.parametrize("kind", CLASSIFIERS + OTHERS)
def test_outer_shares_the_prefix_below_the_first_adapted_block(kind):
    model = hosted(kind, stack=S, target_modules=TARGETS[kind], layers_to_transform=LAST.get(kind, [2]))
    inputs, rows = batch(kind, left=True), []
    expected = loop(model, inputs, S)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    with host.outer(model, S):
        logits = scores(model(**inputs))
    assert rows[0] == (4 if kind in SHARES else 4 * S)
    compare(model, logits, expected)
    with host.outer(model, S, share_prefix=False):
        close(scores(model(**inputs)), expected)


TARGETS = dict.fromkeys(["bert", "roberta", "xlm_roberta", "albert", "bert_model"], ("query", "dense")) | {
    "distilbert": ["q_lin"], "modernbert": ["Wqkv", "Wo"], "gpt2": ["c_attn"], "gpt2_lm": ["c_attn", "c_fc"],
    "llama": ["q_proj", "down_proj"], "llama_lm": ["v_proj"], "mixtral_lm": ["q_proj"], "qwen2": ["o_proj"],
    "opt": ["fc1", "v_proj"], "t5": ["q"], "t5_encoder": ["q", "wo"], "t5_seq2seq": ["v"],
    "deberta": ["key_proj", "value_proj"], "deberta_conv": ["query_proj"],
}  # fmt: skip


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_outer_where_one_half_of_an_encoder_decoder_is_adapted(half):
    model = hosted("t5_seq2seq", stack=S, target_modules=rf"{half}\..*\.(q|v)")
    inputs = batch("t5_seq2seq")
    with host.outer(model, S):
        logits = model(**inputs).logits
    close(logits, loop(model, inputs, S))


@pytest.mark.parametrize("rows", [1, 3, 7, 16])
@pytest.mark.parametrize("kind", ["bert", "deberta", "modernbert", "llama", "gpt2", "t5_encoder"])
def test_outer_at_batches_as_long_as_other_axes(kind, rows):
    """One row, as many as members, tokens or relative positions: nothing but rows may be repeated."""
    model, inputs = hosted(kind, stack=S), batch(kind, rows=rows)
    with host.outer(model, S):
        logits = scores(model(**inputs))
    close(logits, loop(model, inputs, S))


def test_outer_with_positions_embeddings_and_labels():
    model = hosted("llama", stack=S)
    inputs = batch("llama")
    inputs["position_ids"] = torch.arange(7)[None]
    labels = torch.tensor([0, 1, 2, 0])
    expected = loop(model, inputs, S)
    with host.outer(model, S):
        output = model(**inputs, labels=labels)
        own = model(**inputs | {"position_ids": torch.arange(7).repeat(4, 1)})
    close(output.logits, expected)
    close(own.logits, expected)
    close(output.loss, torch.nn.functional.cross_entropy(expected, labels.repeat(S)))
    embeds = model.get_base_model().get_input_embeddings()(batch("bert")["input_ids"])
    encoder = hosted("bert", stack=S)
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    with host.outer(encoder, S):
        logits = encoder(**given).logits
    close(logits, loop(encoder, given, S))


def test_outer_of_one_member_changes_nothing_and_hooks_are_removed():
    model, inputs = hosted("bert"), batch("bert")
    before = model(**inputs).logits
    with host.outer(model, 1):
        assert torch.equal(model(**inputs).logits, before)
    three = hosted("bert", stack=S)
    with pytest.raises(ZeroDivisionError), host.outer(three, S):
        1 / 0  # noqa: B018
    assert three(**repeated(inputs, S)).logits.shape == (12, 3)


def test_members_have_exactly_no_gradient_in_each_other():
    model, inputs = hosted("roberta", stack=S), batch("roberta")
    theta = host.read(model)
    loss = model(**repeated(inputs, S)).logits.reshape(S, -1)[1].square().sum()
    for key, gradient in zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True):
        assert torch.equal(gradient[0], torch.zeros_like(gradient[0])), key
        assert torch.equal(gradient[2], torch.zeros_like(gradient[2])), key
        assert gradient[1].abs().max() > 0, key


def test_one_member_for_each_row_gives_gradients_per_example():
    model, inputs = hosted("bert"), batch("bert", rows=5)
    labels = torch.tensor([0, 1, 2, 1, 0])
    theta = tree.clone(host.read(model))
    apart = []
    for row in range(5):
        one = {k: v[row : row + 1] for k, v in inputs.items()}
        loss = torch.nn.functional.cross_entropy(model(**one).logits, labels[row : row + 1])
        apart.append(torch.autograd.grad(loss, list(host.read(model).values())))
    each = {k: v.repeat(5, *[1] * (v.dim() - 1)).requires_grad_() for k, v in theta.items()}
    host.install(model, host.build(model, each))
    torch.nn.functional.cross_entropy(model(**inputs).logits, labels, reduction="sum").backward()
    for index, key in enumerate(each):
        close(each[key].grad, torch.cat([gradients[index] for gradients in apart]))


def test_rows_that_do_not_divide_are_refused():
    model = hosted("bert", stack=S)
    with pytest.raises(KilobayesError, match=r"stack of 3.*multiple of 3 rows.*4 rows.*outer"):
        model(**batch("bert", rows=4))
    with pytest.raises(KilobayesError, match=r"returned 4 rows for 3 members of 4"):
        host.check_rows(torch.zeros(4, 3), 3, 4)
    assert host.check_rows(torch.zeros(12, 3), 3, 4).shape == (3, 4, 3)


def test_vmap_over_the_whole_model_agrees():
    """An oracle that knows nothing of rows: the plain model, B A added to its weights, over members."""
    model, inputs = hosted("bert", stack=S), batch("bert")
    theta, base = host.read(model), make("bert")
    base.set_attn_implementation("eager")
    weights = {}
    for site in host.sites(model):
        update = 2.0 * torch.bmm(theta[f"{site.name}/B"], theta[f"{site.name}/A"])
        weights[f"{site.name}.weight"] = base.get_parameter(f"{site.name}.weight") + update
    weights |= {"classifier.weight": theta["classifier/weight"], "classifier.bias": theta["classifier/bias"]}
    expected = vmap(lambda w: functional_call(base, w, kwargs=inputs).logits)(weights)
    with host.outer(model, S):
        logits = model(**inputs).logits
    close(logits, expected.flatten(0, 1))


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm_roberta", "distilbert", "gpt2"])
def test_reading_one_token_changes_no_logits(kind):
    model, inputs = hosted(kind, stack=S, target_modules=TARGETS[kind]), batch(kind)
    plain, seen = model(**repeated(inputs, S)).logits, []
    parts = dict(model.named_modules())
    last = parts.get(
        f"base_model.model.{kind.removeprefix('xlm_')}.encoder.layer.2.intermediate.dense", model
    )
    handle = last.register_forward_hook(
        lambda module, args, out: seen.append(args[0].shape[1] if args else 0)
    )
    with host.read_token(model):
        zipped = model(**repeated(inputs, S)).logits
        with host.outer(model, S):
            outer = model(**inputs).logits
    handle.remove()
    assert seen == ([1, 1] if kind in ("bert", "roberta", "xlm_roberta") else [0, 0])
    close(zipped, plain)
    close(outer, plain)
    close(model(**repeated(inputs, S)).logits, plain)


def test_one_stack_size_after_another_on_the_same_model():
    model, inputs = get_peft_model(make("llama"), config("llama", adapter=LoRA(r=2))).eval(), batch("llama")
    expected = model(**inputs).logits
    for stack in (4, 1, 2):
        theta = {k: v.detach().repeat(stack, *[1] * (v.dim() - 1)) for k, v in host.read(model).items()}
        host.install(model, host.build(model, theta))
        with host.outer(model, stack):
            close(model(**inputs).logits, expected.repeat(stack, 1))
    host.install(model, None)
    assert torch.equal(model(**inputs).logits, expected)
