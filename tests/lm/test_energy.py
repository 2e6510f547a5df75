"""Curvature of a language model, and what is fitted on its tokens, against definitions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kilobayes import host
from kilobayes.errors import KilobayesError
from kilobayes.lm.energy import LanguageEnergy, evenly, running
from kilobayes.posteriors import ask
from kilobayes.posteriors.gauss_newton import gauss_newton
from kilobayes.posteriors.laplace import Laplace
from kilobayes.posteriors.temperature import Temperature
from kilobayes.random import generator
from kilobayes.tasks.packing import IGNORED, Tokens
from kilobayes.types import Progress

from ..decoders import hosted
from ..token_rows import rows, task


def brute_force(model: Any, theta: dict[str, Tensor], tokens: Tokens, keys: list[str]) -> Tensor:
    """The generalised Gauss-Newton matrix of the sum of row losses, by all tokens' derivatives."""
    found: Any = 0.0
    leaves = {k: v.clone().requires_grad_() for k, v in theta.items()}
    host.install(model, host.build(model, leaves))
    for ids, labels in zip(tokens.ids, tokens.labels, strict=True):
        scores = model(input_ids=torch.tensor([ids])).logits[0]
        for at in (t for t, label in enumerate(labels) if label != IGNORED):
            each = [torch.autograd.grad(s, [leaves[k] for k in keys], retain_graph=True) for s in scores[at]]
            jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in each]).double()
            p = scores[at].detach().double().softmax(-1)
            found = found + jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
    host.install(model, None)
    return found / tokens.mean_counted


def one_site() -> tuple[Any, dict[str, Tensor], list[str]]:
    model, theta = hosted("llama", 1, layers=[2])
    return model, theta, sorted(k for k in theta if "q_proj" in k)


def every_label(tokens: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """All labels of all tokens, one at a time, weighed by the root of their probability."""

    def weigh(scores: Tensor) -> tuple[Tensor, Tensor]:
        n, v = scores.shape
        assert n == tokens
        labels = torch.arange(v).repeat(n).expand(n, -1)
        own = torch.eye(n).repeat_interleave(v, dim=1)
        return labels, own * scores.softmax(-1).flatten().sqrt()

    return weigh


def test_the_curvature_is_the_gauss_newton_matrix_when_every_label_is_drawn() -> None:
    model, theta, keys = one_site()
    tokens = rows(3, 2)
    energy = LanguageEnergy(model, task(), tokens)
    total: Any = 0.0
    with running(model, backward=True) as head:
        for row in range(2):
            at = torch.tensor([row])
            batch = energy.derivatives(head, theta, keys, at, every_label(tokens.counted[row]))
            flat = torch.cat([batch.gradients[k][0].flatten(1) for k in keys], dim=1).double()
            total = total + flat.T @ flat / tokens.mean_counted
    expected = brute_force(model, theta, tokens, keys)
    torch.testing.assert_close(total, expected, atol=1e-6, rtol=1e-3)


def test_sampled_labels_estimate_it_and_repeat_with_their_generator() -> None:
    model, theta, keys = one_site()
    tokens = rows(3, 2, 4)
    energy = LanguageEnergy(model, task(), tokens, draws=150, batch_size=2)
    found = gauss_newton("diag", energy.sampled(theta, keys, generator(1)), 3, 4, generator(0))
    again = gauss_newton("diag", energy.sampled(theta, keys, generator(1)), 3, 4, generator(0))
    values = torch.cat([found.values[k].flatten() for k in keys])
    assert torch.equal(values, torch.cat([again.values[k].flatten() for k in keys]))
    expected = brute_force(model, theta, tokens, keys).diagonal().float()
    assert abs(float(values.sum() / expected.sum()) - 1) < 0.1
    assert float(torch.corrcoef(torch.stack([values, expected]))[0, 1]) > 0.98


def test_laplace_and_temperature_are_fitted_on_tokens() -> None:
    model, theta = hosted("llama", 1)
    trained, held = rows(8, 5, 9, 7), rows(6, 8, seed=2)
    energy = LanguageEnergy(model, task(), held, trained=trained)
    assert (energy.labels.tolist(), len(energy)) == (
        [t for row in held.labels for t in row if t != IGNORED],
        sum(held.counted),
    )
    posterior = Temperature(Laplace(linearised=False))
    state = posterior.init(theta, generator(0))
    state = posterior.observe(state, theta, Progress(1, 1, 1, 4))
    state = ask.fit(posterior, state, energy, generator(1))
    assert bool(torch.isfinite(state.inner.precision).all())
    drawn = ask.draws(posterior, state, energy, 5, generator(2))
    logits = energy.logits(drawn).double()
    index = energy.labels.expand(5, -1)[..., None]

    def nll(t: float) -> float:
        picked = (logits / t).log_softmax(-1).gather(-1, index)[..., 0]
        return float(math.log(5) - picked.logsumexp(0).mean())

    best = float(state.temperature)
    assert nll(best) < nll(1.0) + 0.02  # other draws than it was fitted on
    with pytest.raises(KilobayesError, match="too many classes"):
        energy.jacobians(theta, [], lambda s: s)


def test_rows_are_taken_evenly_up_to_a_number_of_tokens() -> None:
    tokens = rows(*[6] * 30)
    some = evenly(tokens, 40)
    assert 20 <= sum(some.counted) <= 40
    assert len(set(some.documents)) == len(some)
    assert evenly(tokens, 10**6) is tokens
    assert len(evenly(tokens, 1)) == 1
