"""Real tokens only: equal outputs and gradients, fewer tokens in linear layers, and everything put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import Tensor, nn

from kilobayes import host, tree
from kilobayes.host import unpad
from kilobayes.host.packing import packed
from kilobayes.host.unpad import layout_of, real_tokens
from kilobayes.modes import checkpointing

from .tiny import BUILD, MORE, batch, close, hosted, loop, make, repeated, scores

S = 3
COVERED = [
    "bert", "roberta", "distilbert", "gpt2", "llama", "qwen2", "opt", "gpt2_lm", "llama_lm", "bert_model",
    "opt_lm", *MORE,
]  # fmt: skip
OTHERS = ["albert", "deberta", "modernbert", "t5"]
UPPER = {"bert": ["query"], "gpt2": ["c_attn"], "llama": ["q_proj"]}


@pytest.fixture(autouse=True)
def _any_padding(monkeypatch) -> None:
    monkeypatch.setattr(unpad, "LEAST_PADDING", 0.01)


@contextmanager
def tokens_seen(model: nn.Module) -> Iterator[list[int]]:
    """How many tokens the adapted layers' bases get."""
    seen: list[int] = []
    bases = [layer.base_layer for layer in host.layers(model).values()]
    hooks = [b.register_forward_hook(lambda m, a, out: seen.append(a[0].shape[:-1].numel())) for b in bases]
    yield seen
    for hook in hooks:
        hook.remove()


def at_real(logits: Tensor, mask: Tensor) -> Tensor:
    """Token-wise outputs with zeros at padding; those of a row as they are."""
    return logits * mask.repeat(len(logits) // len(mask), 1).unsqueeze(-1) if logits.dim() == 3 else logits


def gradients(model, logits: Tensor) -> dict[str, Tensor]:
    """Of a random projection with respect to every leaf; the graph may be used again."""
    theta = host.read(model)
    loss = (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))).sum()
    return dict(zip(theta, torch.autograd.grad(loss, list(theta.values()), retain_graph=True), strict=True))


def compare(model, got: Tensor, expected: Tensor, mask: Tensor) -> None:
    """Equal at real tokens, gradients included."""
    got, expected = at_real(got, mask), at_real(expected, mask)
    close(got, expected, 3e-6)
    ours, theirs = gradients(model, got), gradients(model, expected)
    for key in ours:
        close(ours[key], theirs[key], 1e-5)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("kind", COVERED)
def test_a_stack_equals_its_members_on_padded_rows(kind, left):
    model, inputs = hosted(kind, stack=S), batch(kind, left=left)
    mask = inputs["attention_mask"]
    kept = int(mask.sum() + (1 - mask[:, 0]).sum())  # the first column is always kept
    expected = loop(model, inputs, S)
    with real_tokens(model), tokens_seen(model) as seen:
        logits = scores(model(**repeated(inputs, S)))
    assert set(seen) == {S * kept}
    compare(model, logits, expected, mask)
    with real_tokens(model), host.outer(model, S), tokens_seen(model) as seen:
        logits = scores(model(**inputs))
    assert set(seen) == {S * kept}
    compare(model, logits, expected, mask)
    with host.outer(model, S), real_tokens(model):
        compare(model, scores(model(**inputs)), expected, mask)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("kind", UPPER)
def test_members_share_the_blocks_below_the_first_adapted_one(kind, order):
    model = hosted(kind, stack=S, target_modules=UPPER[kind], layers_to_transform=[2])
    inputs = batch(kind)
    expected = loop(model, inputs, S)
    contexts = [lambda: real_tokens(model), lambda: host.outer(model, S)]
    with ExitStack() as stack:
        for context in contexts[:: -1 if order else 1]:
            stack.enter_context(context())
        compare(model, scores(model(**inputs)), expected, inputs["attention_mask"])
    with real_tokens(model):
        compare(model, scores(model(**repeated(inputs, S))), expected, inputs["attention_mask"])


def test_members_with_other_rows_and_other_numbers_of_tokens():
    model = hosted("bert", stack=2)
    mask = torch.tensor([[1] * 6, [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]])
    inputs = {"input_ids": batch("bert", length=6, seed=4)["input_ids"], "attention_mask": mask}
    expected = scores(model(**inputs))
    with real_tokens(model), tokens_seen(model) as seen:
        compare(model, scores(model(**inputs)), expected, mask)
    assert set(seen) == {2 * 7}  # seven for the first member, five and two padded ones for the second


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("left", [False, True])
def test_together_with_packing_and_the_token_that_is_read(kind, reverse, left, monkeypatch):
    monkeypatch.setenv("KILOBAYES_PACK", "1")
    model, inputs = hosted(kind, stack=S), batch(kind, left=left)
    expected = loop(model, inputs, S)
    contexts = [real_tokens, host.read_token, packed]
    with ExitStack() as stack:
        for context in contexts[:: -1 if reverse else 1]:
            stack.enter_context(context(model))
        compare(model, scores(model(**repeated(inputs, S))), expected, inputs["attention_mask"])
        with host.outer(model, S):
            compare(model, scores(model(**inputs)), expected, inputs["attention_mask"])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_recomputed_in_the_backward(kind):
    model, inputs = hosted(kind, stack=S), batch(kind)
    expected = loop(model, inputs, S)
    theirs = gradients(model, expected)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    with real_tokens(model), checkpointing(model), host.read_token(model), tokens_seen(model) as seen:
        logits = scores(model(**repeated(inputs, S)))
        once = len(seen)
        ours = gradients(model, logits)
        assert len(seen) > once
    close(logits, expected, 3e-6)
    for key in ours:
        close(ours[key], theirs[key], 1e-5)


def test_second_derivatives_and_torch_func():
    model, inputs = hosted("bert"), batch("bert")
    leaf = next(iter(host.read(model).values()))

    def curvature() -> Tensor:
        loss = scores(model(**inputs)).square().sum()
        (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        return second

    names = [n for n, p in model.named_parameters() if p is leaf]

    def loss(value: Tensor) -> Tensor:
        return torch.func.functional_call(model, {names[0]: value}, (), dict(inputs)).logits.square().sum()

    model.get_base_model().set_attn_implementation("eager")
    expected, gradient = curvature(), torch.func.grad(loss)(leaf.detach())
    with real_tokens(model):
        close(curvature(), expected, 1e-4)
        close(torch.func.grad(loss)(leaf.detach()), gradient, 1e-5)


def test_left_alone_are_other_architectures_full_rows_and_forwards_that_ask_for_hidden_states():
    for kind in OTHERS:
        model, inputs = hosted(kind, stack=S), batch(kind)
        expected = scores(model(**repeated(inputs, S)))
        with real_tokens(model):
            assert torch.equal(scores(model(**repeated(inputs, S))), expected)
    model, inputs = hosted("bert"), batch("bert")
    full = inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])}
    asked = model(**inputs, output_hidden_states=True)
    for given in (full, {"input_ids": inputs["input_ids"]}):
        expected = model(**given).logits
        with real_tokens(model), tokens_seen(model) as seen:
            assert torch.equal(model(**given).logits, expected)
        assert set(seen) == {28}
    with real_tokens(model):
        got = model(**inputs, output_hidden_states=True)
    assert all(torch.equal(a, b) for a, b in zip(got.hidden_states, asked.hidden_states, strict=True))


def test_a_decoder_with_a_cache_runs_as_before():
    model, inputs = hosted("llama_lm"), batch("llama_lm", left=True)
    expected = model(**inputs, use_cache=True)
    with real_tokens(model):
        got = model(**inputs, use_cache=True)
    assert torch.equal(got.logits, expected.logits)
    keys = [out.past_key_values.layers[0].keys for out in (got, expected)]
    assert torch.equal(*keys)


def test_everything_is_put_back_and_a_plain_model_works_too():
    model, inputs = make("bert"), batch("bert")
    expected = model(**inputs).logits
    with real_tokens(model):
        close(model(**inputs).logits, expected, 3e-6)
    with pytest.raises(ZeroDivisionError), real_tokens(model):
        1 / 0  # noqa: B018
    assert model.config._attn_implementation in unpad.ATTENTION
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert torch.equal(model(**inputs).logits, expected)


def test_every_architecture_named_has_a_test():
    tested = {BUILD[kind]().config.model_type for kind in COVERED}
    assert set(unpad.ARCHITECTURES) == tested


@pytest.mark.parametrize("groups", [1, 2])
def test_layouts_by_hand(groups):
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]])
    layout = layout_of(mask, groups)
    x = torch.arange(16.0).view(4, 4, 1)
    flat = layout.take(x)
    if groups == 1:  # the third row's first token is kept although it is padding
        assert flat[0, :, 0].tolist() == [0, 1, 4, 8, 9, 10, 12, 13, 14, 15]
    else:  # the first member's real tokens, then its first padded ones, up to the second's seven
        assert flat[:, :, 0].tolist() == [[0, 1, 4, 2, 3, 5, 6], [8, 9, 10, 12, 13, 14, 15]]
    back = layout.pad(flat)
    places = torch.zeros(16).index_fill(0, layout.index.flatten(), 1.0).view(4, 4, 1)
    assert torch.equal(back, x * places)
    twice = layout.take(torch.cat([x, x + 100]))
    assert torch.equal(twice, torch.cat([flat, flat + 100]))
    assert layout_of(torch.ones(4, 4), groups) is None
    unpad.LEAST_PADDING = 0.5
    assert layout_of(mask, groups) is None
    assert tree.size({"x": layout.index}) == groups
