"""Losses, curvature and predictions of a language model, against definitions."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kilobayes import host, tree
from kilobayes.errors import KilobayesError
from kilobayes.host.vocabulary import Vocabulary, check_output, hidden_states
from kilobayes.lm.predict import token_scores
from kilobayes.metrics import ece
from kilobayes.metrics.language import TokenScores, summarise
from kilobayes.posteriors.point import Point
from kilobayes.random import generator
from kilobayes.tasks.lm import TokenRows
from kilobayes.tasks.packing import IGNORED, Tokens, pack
from kilobayes.train import Settings, fit
from kilobayes.workflows.language import check_packing, row_nll

from .decoders import BUILD, hosted, make
from .token_rows import rows, task


def nats(model: Any, theta: dict[str, Tensor], tokens: Tokens, members: int) -> Tensor:
    """Row sums ``(S, B)``, all rows in one batch."""
    inputs, labels = task().collate(tokens, range(len(tokens)))
    with hidden_states(model) as head, host.outer(model, members):
        host.install(model, host.build(model, theta))
        model(**inputs)
        found = head.row_nll(labels.repeat(members, 1)).reshape(members, -1)
    host.install(model, None)
    return found


def slowly(model: Any, theta: dict[str, Tensor], tokens: Tokens) -> Tensor:
    """Row sums ``(S, B)`` of every member and row alone, from the model's own scores."""
    out = torch.zeros(tree.size(theta), len(tokens))
    for s in range(tree.size(theta)):
        host.install(model, host.build(model, tree.member(theta, slice(s, s + 1))))
        for at, (ids, labels) in enumerate(zip(tokens.ids, tokens.labels, strict=True)):
            logs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            out[s, at] = -sum(logs[t, label] for t, label in enumerate(labels) if label != IGNORED)
    host.install(model, None)
    return out


@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_losses_in_chunks_are_cross_entropies_with_their_derivatives(
    cap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kilobayes.host.vocabulary.NUMBERS_AT_ONCE", 3 * 7)  # chunks of 3 tokens
    gen = generator(0)
    weight, bias = torch.randn(7, 5, generator=gen), torch.randn(7, generator=gen)
    hidden = torch.randn(10, 5, generator=gen, requires_grad=True)
    labels, weights = torch.randint(7, (10,), generator=gen), torch.randn(10, generator=gen)
    found = Vocabulary(weight, bias, 1.5, cap).nll(hidden, labels)
    scores = 1.5 * (hidden @ weight.T + bias)
    scores = cap * (scores / cap).tanh() if cap else scores
    expected = torch.nn.functional.cross_entropy(scores, labels, reduction="none")
    torch.testing.assert_close(found, expected)
    (mine,) = torch.autograd.grad((found * weights).sum(), hidden)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), hidden)
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kind", [k for k in BUILD if k not in ("opt", "bloom")])
def test_packed_rows_lose_what_they_lose_alone(kind: str) -> None:
    model, theta = hosted(kind, 3)
    plain = rows(9, 4, 7, 2)
    packed = pack(plain, 16)
    assert packed.packed
    with torch.no_grad():
        alone, unpacked, together = (
            slowly(model, theta, plain),
            nats(model, theta, plain, 3),
            nats(model, theta, packed, 3),
        )
    torch.testing.assert_close(unpacked, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.sum(1), alone.sum(1), atol=1e-5, rtol=1e-5)
    check_packing(make(kind), task())
    check_output(model, torch.tensor([[3, 4, 5]]))


def test_a_model_whose_texts_would_see_each_other_is_refused() -> None:
    model = make("llama")
    own = model.model.forward
    model.model.forward = lambda **kw: own(**{k: v for k, v in kw.items() if k != "position_ids"})
    with pytest.raises(KilobayesError, match="see each other"):
        check_packing(model, task())


def test_a_model_that_counts_positions_from_the_mask_is_refused() -> None:
    with pytest.raises(KilobayesError, match="see each other"):
        check_packing(make("bloom"), task())  # its attention is biased by distances in the whole row


def train(model: Any, tokens: Tokens, **settings: Any) -> dict[str, Tensor]:
    """Leaves after a few steps."""
    theta, _ = host.initial(host.method(model), host.sites(model), [0, 1])
    made = Settings(lr=0.01, epochs=2, seeds=(0, 1), **settings)
    with host.real_tokens(model), hidden_states(model) as head:
        nll = row_nll(head, tokens.mean_counted)
        return fit(model, TokenRows(task(), tokens), nll, Point(), theta, made).state.theta


def test_training_depends_neither_on_micro_batches_nor_on_checkpointing() -> None:
    model, _ = hosted("llama", 1)
    tokens = rows(9, 4, 7, 2, 5, 8, 3, 6)
    whole = train(model, tokens, batch_size=4)
    parts = train(model, tokens, batch_size=4, accumulate=4)
    with warnings.catch_warnings():  # transformers has another name for it from 5.23 on
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    saved = train(model, tokens, batch_size=4)
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(saved[key], value, atol=1e-5, rtol=1e-4)


def test_a_row_s_loss_is_its_sum_over_the_mean_number_of_learned_tokens() -> None:
    model, theta = hosted("llama", 1)
    tokens = rows(9, 4, 7)
    with torch.no_grad(), hidden_states(model) as head:
        host.install(model, host.build(model, theta))
        inputs, labels = task().collate(tokens, [0, 1, 2])
        output = model(**inputs)
        found = row_nll(head, tokens.mean_counted)(output, labels.reshape(1, -1))
    alone = slowly(model, theta, tokens).detach()
    torch.testing.assert_close(found.mean(), alone.sum() / sum(tokens.counted))
    torch.testing.assert_close(found, alone * 3 / sum(tokens.counted))


def test_averaged_probabilities_of_tokens_against_definitions() -> None:
    model, theta = hosted("llama", 4)
    tokens = rows(9, 4, 6)
    found = token_scores(model, theta, task(), tokens, transform=lambda z: z / 1.3, batch_size=2)
    at = 0
    for row, (ids, labels) in enumerate(zip(tokens.ids, tokens.labels, strict=True)):
        each = []
        for s in range(4):
            host.install(model, host.build(model, tree.member(theta, slice(s, s + 1))))
            with torch.no_grad():
                each.append((model(input_ids=torch.tensor([ids])).logits[0] / 1.3).double().softmax(-1))
        host.install(model, None)
        probs = torch.stack(each)
        for t, label in enumerate(labels):
            if label == IGNORED:
                continue
            mean = probs[:, t].mean(0)
            own = -(probs[:, t] * probs[:, t].log()).sum(-1).mean()
            entropy = -(mean * mean.log()).sum()
            expected = [-mean[label].log(), mean.max(), entropy, entropy - own]
            mine = [v[at] for v in (found.nll, found.confidence, found.entropy, found.information)]
            np.testing.assert_allclose(mine, [float(v) for v in expected], rtol=1e-4, atol=1e-5)
            assert found.right[at] == (int(mean.argmax()) == label)
            assert found.document[at] == row
            at += 1
    assert at == len(found.nll)


def test_figures_by_hand() -> None:
    nll, confidence = np.array([1.0, 2.0, 3.0]), np.array([0.9, 0.5, 0.2])
    scores = TokenScores(
        nll, confidence, np.array([True, False, False]), np.ones(3), np.zeros(3), np.array([0, 0, 1]),
        np.array([4, 5]),
    )  # fmt: skip
    found = {k: v.value for k, v in summarise(scores, resamples=20).items()}
    assert found["nll"] == pytest.approx(2.0)
    assert found["perplexity"] == pytest.approx(math.exp(2.0))
    assert found["bits_per_byte"] == pytest.approx(6.0 / math.log(2) / 9)
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["ece"] == pytest.approx((0.1 + 0.5 + 0.2) / 3)
    gen = np.random.default_rng(0)
    probs = gen.dirichlet(np.ones(4), 200)
    labels = gen.integers(4, size=200)
    top, right = probs.max(1), probs.argmax(1) == labels
    many = TokenScores(top, top, right, top, top, np.repeat(np.arange(20), 10), np.ones(20, int))
    assert summarise(many, resamples=5)["ece"].value == pytest.approx(float(ece(probs, labels)))
    both = summarise(scores, many, resamples=5)
    assert {"ood_nll", "ood_auroc", "ood_auroc_mi"} <= both.keys()
