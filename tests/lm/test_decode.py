"""Averaged generation over a cache equals generation that computes everything anew, member by member."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers as tf

from kilobayes import host
from kilobayes.errors import KilobayesError
from kilobayes.lm.decode import Generated, averaged, generate, steps
from kilobayes.lm.sampling import Sampling
from kilobayes.random import generator

from ..decoders import BUILD, hosted, make, member_probs, prompts, slowly

NEW = 4
SHORT = Sampling(max_new_tokens=NEW)
WARM = Sampling(max_new_tokens=NEW, temperature=0.8, top_k=20, top_p=0.9)


def streams(count: int) -> list[torch.Generator]:
    return [generator(11, row) for row in range(count)]


def same(found: list[Generated], expected: list[dict]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.tokens == theirs["tokens"]
        for name in ("log_probs", "entropy", "information"):
            np.testing.assert_allclose(getattr(ours, name), theirs[name], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("upper", [False, True], ids=["all", "upper"])
@pytest.mark.parametrize("kind", BUILD)
def test_it_equals_everything_computed_anew(kind: str, upper: bool) -> None:
    model, theta = hosted(kind, 4, [2] if upper else None)
    ids, mask = prompts(5, 2, 7)
    found = generate(model, theta, ids, mask, SHORT)
    same(found, slowly(model, theta, ids, mask, SHORT))
    assert all(g.finish == "length" for g in found)
    assert max(max(g.information) for g in found) > 0.05  # the draws do differ
    if upper:
        drawn = generate(model, theta, ids, mask, WARM, gen=streams(3))
        same(drawn, slowly(model, theta, ids, mask, WARM, streams(3)))
    assert all(layer.installed is None for layer in host.layers(model).values())


@pytest.mark.parametrize("layers", [None, [1, 2]], ids=["all", "upper"])
@pytest.mark.parametrize("stack", [1, 16])
def test_any_number_of_draws(stack: int, layers: list[int] | None) -> None:
    model, theta = hosted("llama", stack, layers)
    ids, mask = prompts(3, 6)
    same(generate(model, theta, ids, mask, SHORT), slowly(model, theta, ids, mask, SHORT))


def test_blocks_below_the_first_adapted_one_are_cached_once() -> None:
    model, theta = hosted("llama", 4, [1, 2])
    ids, mask = prompts(5, 2, 7)
    seen = []

    def note(module, args, kwargs) -> None:
        cache = kwargs["past_key_values"]
        seen.append([len(layer.keys) for layer in cache.layers if layer.get_seq_length()])

    first = model.get_base_model().model.layers[0]
    handle = first.register_forward_pre_hook(note, with_kwargs=True)
    generate(model, theta, ids, mask, SHORT)
    handle.remove()
    assert seen == [[], *[[3, 12, 12]] * (NEW - 1)]


def test_draws_in_turns_give_the_same() -> None:
    model, theta = hosted("qwen2", 5)
    ids, mask = prompts(5, 2)
    whole = generate(model, theta, ids, mask, SHORT)
    parted = generate(model, theta, ids, mask, SHORT, cached_tokens=2 * 2 * (5 + NEW))
    for a, b in zip(whole, parted, strict=True):
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.information, b.information, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", BUILD)
def test_one_draw_is_transformers_own_generation(kind: str) -> None:
    model, theta = hosted(kind, 1)
    host.write(model, theta)
    ids, mask = prompts(5, 2, 7)
    theirs = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None,
        pad_token_id=0, use_cache=True,
    )[:, 7:]  # fmt: skip
    longer = Sampling(max_new_tokens=12)
    assert [g.tokens for g in generate(model, theta, ids, mask, longer)] == theirs.tolist()
    assert [g.tokens for g in generate(model, None, ids, mask, longer)] == theirs.tolist()


def test_greedy_text_depends_on_no_other_row() -> None:
    model, theta = hosted("gpt2", 3)
    ids, mask = prompts(5, 2, 7, 4)
    whole = [g.tokens for g in generate(model, theta, ids, mask, SHORT)]
    order = [2, 0, 3, 1]
    turned = generate(model, theta, ids[order], mask[order], SHORT)
    assert [g.tokens for g in turned] == [whole[i] for i in order]
    alone = [generate(model, theta, ids[i : i + 1], mask[i : i + 1], SHORT)[0].tokens for i in range(4)]
    assert alone == whole


def test_completions_read_the_prompt_once_and_are_those_of_repeated_prompts() -> None:
    model, theta = hosted("opt", 3, [1, 2])
    ids, mask = prompts(5, 2)
    repeated = [t.repeat_interleave(3, dim=0) for t in (ids, mask)]
    found = generate(model, theta, ids, mask, WARM, gen=streams(6), completions=3)
    same(found, slowly(model, theta, *repeated, WARM, streams(6)))
    assert len({tuple(g.tokens) for g in found[:3]}) > 1


def test_sampled_tokens_have_the_averaged_distribution() -> None:
    model, theta = hosted("llama", 4)
    ids, mask = prompts(5)
    one = Sampling(max_new_tokens=1, temperature=1.0)
    count = 4000
    found = generate(model, theta, ids, mask, one, gen=generator(3), completions=count)
    seen = np.bincount([g.tokens[0] for g in found], minlength=61)
    expected = count * member_probs(model, theta, ids[0].tolist()).mean(dim=0).numpy()
    often = expected > 5
    chi = float((((seen - expected) ** 2 / expected)[often]).sum())
    assert chi < often.sum() + 4 * math.sqrt(2 * often.sum())
    scores = member_probs(model, theta, ids[0].tolist()).log().mean(dim=0).softmax(-1).numpy() * count
    wrong = float((((seen - scores) ** 2 / scores)[often]).sum())
    assert wrong > chi + 100  # and not that of averaged scores


def test_sequences_end_at_stop_tokens_and_others_go_on() -> None:
    model, theta = hosted("llama", 4, [2])
    ids, mask = prompts(5, 2, 7)
    whole = [g.tokens for g in generate(model, theta, ids, mask, SHORT)]
    stop = whole[0][2]
    found = generate(model, theta, ids, mask, SHORT, stop_ids=[stop])
    for ours, free in zip(found, whole, strict=True):
        end = free.index(stop) + 1 if stop in free else NEW
        assert ours.tokens == free[:end]
        assert ours.finish == ("stop" if stop in free else "length")
    assert found[0].finish == "stop"
    assert {g.finish for g in found} == {"stop", "length"}
    early = generate(model, theta, ids, mask, SHORT, stopped=lambda tokens: len(tokens) == 2)
    assert [(g.tokens, g.finish) for g in early] == [(free[:2], "stop") for free in whole]


@pytest.mark.parametrize("name", ["entropy", "information"])
def test_sequences_end_where_the_model_is_in_doubt(name: str) -> None:
    model, theta = hosted("gpt2", 4)
    ids, mask = prompts(5, 2, 7)
    whole = generate(model, theta, ids, mask, SHORT)
    most = float(np.quantile([v for g in whole for v in getattr(g, name)], 0.7))
    found = generate(model, theta, ids, mask, Sampling(NEW, **{f"stop_{name}": most}))
    for ours, free in zip(found, whole, strict=True):
        values = getattr(free, name)
        end = next((i for i, v in enumerate(values) if v > most), NEW)
        assert ours.tokens == free.tokens[:end]
        assert ours.finish == ("uncertain" if end < NEW else "length")
        assert len(ours.entropy) == end
        if end < NEW:
            assert ours.doubt is not None
            assert ours.doubt[name == "information"] == pytest.approx(values[end], rel=1e-3)
    assert "uncertain" in {g.finish for g in found}


def test_the_context_ends_a_sequence() -> None:
    model, theta = hosted("gpt2", 2)
    ids, mask = prompts(38, 36)
    found = generate(model, theta, ids, mask, SHORT, longest=40)
    assert [(len(g.tokens), g.finish) for g in found] == [(2, "length"), (4, "length")]
    with pytest.raises(KilobayesError, match="prompt 1 has 38 tokens; the model takes 38"):
        generate(model, theta, ids, mask, SHORT, longest=38)


def test_a_temperature_of_the_posterior_is_before_the_average() -> None:
    model, theta = hosted("llama", 3)
    ids, mask = prompts(4)
    divisor = torch.tensor([0.5, 1.0, 2.0])[:, None, None]
    (found,) = generate(model, theta, ids, mask, Sampling(1), transform=lambda z: z / divisor)
    each = (member_probs(model, theta, ids[0].tolist()).log() / divisor[:, 0]).softmax(-1)
    probs = each.mean(dim=0)
    assert found.tokens == [int(probs.argmax())]
    assert found.entropy[0] == pytest.approx(float(-(probs * probs.log()).sum()), rel=1e-4)


def test_uncertainty_is_what_its_definitions_say() -> None:
    scores = np.random.default_rng(0).normal(size=(5, 3, 11)) * 2
    scores[:, :, 4] = -np.inf  # a token that the model rules out
    each = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    probs, entropy, information = averaged(torch.tensor(scores))
    mean = each.mean(0)

    def plogp(p):
        return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)

    np.testing.assert_allclose(probs, mean, rtol=1e-5)
    np.testing.assert_allclose(entropy, plogp(mean), rtol=1e-5)
    np.testing.assert_allclose(information, plogp(mean) - plogp(each).mean(0), rtol=1e-4)
    assert not averaged(torch.tensor(scores[:1]))[2].any()


def test_alternatives_are_the_most_probable_tokens() -> None:
    model, theta = hosted("qwen2", 4)
    ids, mask = prompts(5)
    (found,) = generate(model, theta, ids, mask, Sampling(1, alternatives=3))
    probs = member_probs(model, theta, ids[0].tolist()).mean(dim=0)
    top = probs.topk(3)
    assert [token for token, _ in found.alternatives[0]] == top.indices.tolist()
    np.testing.assert_allclose([p for _, p in found.alternatives[0]], top.values, rtol=1e-4)
    (none,) = generate(model, theta, ids, mask, Sampling(1, alternatives=0))
    assert none.alternatives == [[]]


def test_a_model_with_another_memory_is_refused() -> None:
    model = tf.MambaForCausalLM(tf.MambaConfig(vocab_size=61, hidden_size=8, num_hidden_layers=1)).eval()
    with pytest.raises(KilobayesError, match="cache keys and values alone; MambaForCausalLM keeps"):
        generate(model, None, *prompts(3), SHORT)


def test_steps_come_one_by_one_and_may_be_left() -> None:
    model, theta = hosted("llama", 2)
    ids, mask = prompts(5, 2)
    whole = generate(model, theta, ids, mask, SHORT)
    going = steps(model, theta, ids, mask, SHORT)
    assert [next(going).tokens for _ in range(2)] == [[g.tokens[i] for g in whole] for i in range(2)]
    going.close()
    assert all(layer.installed is None for layer in host.layers(model).values())
    model.train()
    assert generate(model, theta, ids, mask, SHORT)[0].tokens == whole[0].tokens  # and modes come back
    assert model.training


def test_wrong_input_is_explained() -> None:
    model = make("llama")
    ids, mask = prompts(4, 3)
    with pytest.raises(KilobayesError, match="padded to the left"):
        generate(model, None, ids, mask.flip(1), SHORT)
    with pytest.raises(KilobayesError, match="prompt 2 is empty"):
        generate(model, None, ids, mask * torch.tensor([[1], [0]]), SHORT)
    with pytest.raises(KilobayesError, match="one shape"):
        generate(model, None, ids, mask[:, 1:], SHORT)
    with pytest.raises(KilobayesError, match="sampling needs a generator"):
        generate(model, None, ids, mask, WARM)
