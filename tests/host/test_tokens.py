"""Masks of tokens: Bernoulli, independent, and the same however rows are batched, padded or stacked."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from kilobayes import host, tree
from kilobayes.adapters import LoRA
from kilobayes.errors import KilobayesError
from kilobayes.host import unpad
from kilobayes.modes import checkpointing
from kilobayes.posteriors import MCDropout
from kilobayes.random import generator
from kilobayes.testing.tiny import CLS, TinyRows, installed, perturbed, scores, tiny_model, tiny_start
from kilobayes.types import Params

from .tiny import batch, close, hosted

S, P = 3, 0.3
FED_BY_TOKENS = {"bert": ["query", "dense"], "opt": ["q_proj", "fc1", "fc2"], "gpt2": ["c_attn", "c_proj"]}
KINDS = ["bert", "roberta", "distilbert", "gpt2", "llama", "qwen2", "opt", "albert", "modernbert"]


@pytest.fixture(autouse=True)
def _any_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpad, "LEAST_PADDING", 0.01)


def draws(theta: Params, count: int, p: float = P, over: str = "") -> Params:
    """Of masks around one member's weights."""
    method = MCDropout(p=p, over=over, noise="token")
    return method.sample(method.init(theta, generator(1)), count, generator(2))


def masks(theta: Params, rows: TinyRows) -> dict[str, Tensor]:
    """By site, what each token's input is multiplied by: ``(S, rows, T, d)``."""
    model, found, count = tiny_model(LoRA(r=2)), {}, tree.size(theta)
    inputs, _ = rows.batch(torch.arange(len(rows)))
    with installed(model, theta), host.outer(model, count):
        model(**inputs)
        for site, layer in host.layers(model).items():
            ones = torch.ones(count * len(rows), inputs["input_ids"].shape[1], layer.d_in)
            found[site] = layer.installed.mask(ones).unflatten(0, (count, -1))
    return found


def test_masks_are_bernoulli_and_no_two_tokens_sites_or_draws_share_one() -> None:
    rows = TinyRows([[CLS] + [9] * 11, [CLS] + [9] * 10 + [8]], torch.zeros(2, dtype=torch.int64))
    found = masks(draws(tiny_start(tiny_model(LoRA(r=2)), [3]), 40), rows)
    every = torch.cat([m.flatten(0, 2)[:, :32] for m in found.values()])  # a mask a row
    assert every.unique().tolist() == pytest.approx([0.0, 1 / (1 - P)], abs=1e-4)
    equal = ((1 - P) ** 2 + P**2) ** 32 * len(every) ** 2 / 2  # expected pairs of equal masks
    assert len(every) - len((every > 0).unique(dim=0)) < equal + 5 * equal**0.5
    kept = (every > 0).double()
    assert abs(float(kept.mean()) - (1 - P)) < 5 * (P * (1 - P) / kept.numel()) ** 0.5
    pairs = torch.corrcoef(kept.T) - torch.eye(32)  # of columns
    assert float(pairs.abs().max()) < 5 / len(kept) ** 0.5
    for along in (
        lambda m: m[:-1] * m[1:],
        lambda m: m[:, 0] * m[:, 1],
        lambda m: m[:, :, :-1] * m[:, :, 1:],
    ):
        both = torch.cat([along((m > 0).double()).flatten() for m in found.values()])  # neighbours' product
        assert abs(float(both.mean()) - (1 - P) ** 2) < 5 * float(both.std()) / len(both) ** 0.5
    one, other = (m > 0 for m in list(found.values())[:2])
    both = (one & other).double()
    assert abs(float(both.mean()) - (1 - P) ** 2) < 5 * float(both.std()) / both.numel() ** 0.5


@pytest.mark.parametrize("p", [0.1, 0.6])
def test_moments_at_one_layer(p: float) -> None:
    """E y is the output without dropout, Var y is p / (1 - p) sum_j (a_ij x_j)^2, with a = B A."""
    model, rows, count = tiny_model(LoRA(r=2)), TinyRows.make(2), 1500
    site = next(s.name for s in host.sites(model))
    theta = perturbed(tiny_start(model, [3]))
    drawn = draws(theta, count, p, f"{site}/A")
    seen: list[tuple[Tensor, Tensor]] = []
    hook = host.layers(model)[site].register_forward_hook(lambda m, a, out: seen.append((a[0], out)))
    with torch.no_grad():
        scores(model, theta, rows)
        scores(model, drawn, rows)
    hook.remove()
    (x, plain), (_, noisy) = seen
    error = noisy.unflatten(0, (count, -1)).double() - plain
    a = (host.build(model, theta)[site].B @ host.build(model, theta)[site].A)[0]
    variance = p / (1 - p) * x.double().square() @ a.double().square().T
    assert float((error.mean(0).abs() / (variance / count).sqrt()).max()) < 5
    squares = error.square()
    miss = (squares.mean(0) - variance).abs() / (squares.std(0) / count**0.5)
    assert float(miss.max()) < 5


def each_alone(model: Any, drawn: Params, inputs: dict[str, Tensor]) -> Tensor:
    """Scores of one draw on one row at a time, with no padding: ``(S, rows, C)``."""
    out = []
    for s in range(S):
        with installed(model, tree.member(drawn, s)):
            for row, mask in enumerate(inputs["attention_mask"].bool()):
                out.append(model(input_ids=inputs["input_ids"][row][mask][None]).logits[0])
    return torch.stack(out).unflatten(0, (S, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_prediction_depends_on_its_row_and_seed_alone(kind: str) -> None:
    more = {"target_modules": FED_BY_TOKENS[kind]} if kind in FED_BY_TOKENS else {}
    model, inputs = hosted(kind, **more), batch(kind, rows=6)
    drawn = draws({k: v.detach() for k, v in host.read(model).items()}, S)
    other = [lambda: host.outer(model, S), lambda: host.real_tokens(model), lambda: host.read_token(model)]
    ways: list[list[Callable[[], Any]]] = [other[:1], other[:2], other[1::-1], other, other[::-1]]
    ways.append([lambda: host.outer(model, S, share_prefix=False), *other[1:]])
    with torch.no_grad():
        expected = each_alone(model, drawn, inputs)
        assert len(expected.flatten(1).unique(dim=0)) == S
        for contexts in ways:
            with installed(model, drawn), ExitStack() as stack:
                for context in contexts:
                    stack.enter_context(context())
                got = model(**inputs).logits.unflatten(0, (S, -1))
            close(got, expected, 1e-5)
        zipped = {k: v.repeat(S, 1)[torch.arange(6 * S).roll(2)] for k, v in inputs.items()}
        with installed(model, drawn), host.real_tokens(model):
            got = model(**zipped).logits  # other rows for each member
        close(got, torch.stack([expected[i // 6, (i - 2) % 6] for i in range(6 * S)]), 1e-5)
        with host.outer(model, S), installed(model, drawn):  # installed within
            close(model(**inputs).logits.unflatten(0, (S, -1)), expected, 1e-5)


def test_rows_padded_on_the_left() -> None:
    model = hosted("llama")
    drawn = draws({k: v.detach() for k, v in host.read(model).items()}, S)
    inputs = batch("llama", left=True)
    with torch.no_grad():
        expected = each_alone(model, drawn, inputs)
        with installed(model, drawn), host.outer(model, S), host.real_tokens(model):
            close(model(**inputs).logits.unflatten(0, (S, -1)), expected, 1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("unpadded", [False, True])
def test_recomputed_in_the_backward(reentrant: bool, unpadded: bool) -> None:
    model = tiny_model(LoRA(r=2))
    inputs, _ = TinyRows.make(6).batch(torch.arange(6))
    drawn = draws(perturbed(tiny_start(model, [3])), S)
    leaves = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in drawn.items()}
    found = []
    for again in (False, True):
        if again:
            model.base_model.model._activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with ExitStack() as stack:
            stack.enter_context(installed(model, leaves))
            stack.enter_context(host.outer(model, S))
            stack.enter_context(checkpointing(model))
            if unpadded:
                stack.enter_context(host.real_tokens(model))
            model(**inputs).logits.square().sum().backward()
        found.append({k: v.grad for k, v in leaves.items() if v.grad is not None})
        for value in leaves.values():
            value.grad = None
    assert len(found[0]) == len(tree.plain(leaves))
    assert not tree.first_difference(*found)


def test_what_is_installed_follows_the_model_until_it_is_removed() -> None:
    model, rows = tiny_model(LoRA(r=2)), TinyRows.make(3)
    theta = perturbed(tiny_start(model, [3]))
    backbone = model.base_model.model.bert
    with torch.no_grad(), installed(model, draws(theta, 2)):
        scores(model, draws(theta, 2), rows)
        host.install(model, host.build(model, draws(theta, 2)))
        assert len(backbone._forward_pre_hooks) == 1
    assert not backbone._forward_pre_hooks
    with torch.no_grad():  # a share of 1 - p close to 1 is kept to 2^-16
        assert torch.equal(scores(model, theta, rows), scores(model, theta, rows))
        assert not torch.equal(scores(model, draws(theta, 1, 0.01), rows), scores(model, theta, rows))


def refused(match: str) -> Any:
    return pytest.raises(KilobayesError, match=match)


def test_refused_where_tokens_are_not_known() -> None:
    model, inputs = hosted("llama_lm"), batch("llama_lm")
    with torch.no_grad(), installed(model, draws(dict(host.read(model)), 1)):
        with refused("past_key_values") as error:
            model.generate(**inputs, max_new_tokens=2, use_cache=True)
        assert 'noise="row"' in str(error.value)
        with refused("no input_ids"):
            model(inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]))
        with refused("not one of the rows' tokens"):
            model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"][:, None, None])
    for kind, why in (("deberta", "a layer's input"), ("t5_seq2seq", "decoder_input_ids|a layer's input")):
        model = hosted(kind)
        with torch.no_grad(), installed(model, draws(dict(host.read(model)), 1)), refused(why):
            model(**batch(kind))
    model = hosted("bert")
    with refused("inputs of adapted layers"):
        host.install(model, host.build(model, draws(dict(host.read(model)), 1, over="classifier/weight")))
