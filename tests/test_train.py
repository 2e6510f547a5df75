"""The training loop on a tiny random BERT: stacks against single runs, divergence, recomputation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kilobayes import step, train, tree
from kilobayes.adapters import LoRA
from kilobayes.errors import KilobayesError
from kilobayes.optim import AdamW
from kilobayes.posteriors import SWA, Ensemble, Point
from kilobayes.testing.tiny import TinyRows, nll, tiny_model, tiny_start
from kilobayes.types import Params, Posterior, Progress

ROWS = TinyRows.make(27, seed=4)  # 27 rows in batches of 8: the last one of an epoch has 3
METHOD = LoRA(r=2, dropout=0.25)


def settings(**changes: Any) -> train.Settings:
    plain: dict[str, Any] = {
        "lr": 0.01,
        "epochs": 2,
        "batch_size": 8,
        "seeds": (5,),
        "optimiser": AdamW(clip=0.5),
    }
    return train.Settings(**plain | changes)


def run(
    posterior: Posterior, *, method: LoRA = METHOD, double: bool = False, **changes: Any
) -> train.Trained:
    keywords = {k: changes.pop(k) for k in ("save", "watch") if k in changes}
    chosen = settings(**changes)
    model = tiny_model(method)
    start = tiny_start(model, list(chosen.seeds))
    if double:
        model.double()
        start = tree.map_params(Tensor.double, start)
    return train.fit(model, ROWS, double_nll if double else nll, posterior, start, chosen, **keywords)


def double_nll(output: Any, labels: Tensor) -> Tensor:
    scores = output.logits.reshape(*labels.shape, -1).log_softmax(-1)
    return -scores.gather(-1, labels[..., None])[..., 0]


def assert_close(a: Params, b: Params, tolerance: float) -> None:
    for key in a:
        scale = float(b[key].abs().max())
        assert float((a[key] - b[key]).abs().max()) <= tolerance * scale, key


@pytest.mark.parametrize(("double", "tolerance"), [(True, 1e-10), (False, 1e-5)])
@pytest.mark.parametrize("posterior", [Point(3.0), SWA(start=0.25, snapshots=4)])
def test_members_of_a_stack_equal_runs_alone(posterior: Posterior, double: bool, tolerance: float) -> None:
    seeds, rates = (5, 2, 11), (0.01, 0.002, 0.03)
    changes: dict[str, Any] = {"accumulate": 3, "optimiser": AdamW(clip=0.3, weight_decay=0.1, epsilon=1e-5)}
    together = run(Ensemble(posterior, members=3), seeds=seeds, lr=rates, double=double, **changes)
    assert together.losses.shape == (8, 3)
    for index, (seed, rate) in enumerate(zip(seeds, rates)):
        alone = run(posterior, seeds=(seed,), lr=rate, double=double, **changes)
        mean = posterior.mean(together.state)
        assert_close(tree.member(mean, index), posterior.mean(alone.state), tolerance)
        torch.testing.assert_close(together.losses[:, index], alone.losses[:, 0], rtol=1e-5, atol=1e-6)
    assert tree.first_difference(tree.member(mean, 0), tree.member(mean, 1))


@pytest.mark.parametrize("accumulate", [2, 3, 5, 8, 20])
def test_accumulation_changes_nothing(accumulate: int) -> None:
    whole, parts = (run(Point(2.0), double=True, accumulate=k).state.theta for k in (1, accumulate))
    assert_close(parts, whole, 1e-10)


def test_every_epoch_visits_every_row_once_in_an_order_of_its_own() -> None:
    seen = [torch.cat([step.rows_of_step(3, 4 * epoch + at, 27, 8) for at in range(4)]) for epoch in range(3)]
    assert all(torch.equal(rows.sort().values, torch.arange(27)) for rows in seen)
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(step.order(3, 0, 27), step.order(4, 0, 27))
    assert len(step.rows_of_step(3, 3, 27, 8)) == 3


def test_the_gradient_of_a_step_is_that_of_the_mean_loss() -> None:
    """One step of the loop against autograd straight through the model, dropout off, in float64."""
    model = tiny_model(LoRA(r=2)).double()
    theta = {k: v.double().requires_grad_() for k, v in tiny_start(model, [5]).items()}
    from kilobayes.random import Streams, generator
    from kilobayes.testing.tiny import installed

    posterior = Point(3.0)
    state = posterior.init(theta, generator(1))
    for value in theta.values():
        value.data += 0.01
    work = step.Step(
        model,
        ROWS,
        double_nll,
        posterior,
        Streams([generator(5, 1)]),
        (5,),
        8,
        3,
        step.Processes(torch.device("cpu")),
    )
    work.run(state, theta, Progress(1, 8, 4, 27), "no")
    found = {k: v.grad for k, v in theta.items()}
    inputs, labels = ROWS.batch(step.rows_of_step(5, 0, 27, 8))
    other = {k: v.detach().clone().requires_grad_() for k, v in theta.items()}
    with installed(model, other):
        loss = double_nll(model(**inputs), labels[None]).mean()
        loss = loss + sum(3.0 / (2 * 27) * (other[k] - state.center[k]).square().sum() for k in other)
        loss.backward()
    for key, value in other.items():
        torch.testing.assert_close(found[key], value.grad, rtol=1e-9, atol=1e-12)


def test_learns_a_learnable_toy() -> None:
    trained = run(Point(), method=LoRA(r=4), lr=0.03, epochs=25)
    assert float(trained.losses[:4].mean()) > 0.8
    assert float(trained.losses[-4:].mean()) < 0.3
    assert not trained.diverged
    assert trained.stopped == ""


def test_a_large_prior_stays_where_it_starts() -> None:
    start = tiny_start(tiny_model(METHOD), [5])
    free, held = (run(Point(precision), epochs=6).state.theta for precision in (0.0, 1e7))
    moved = {k: float((free[k] - start[k]).abs().max()) for k in start}
    assert min(moved.values()) > 0.01
    assert max(float((held[k] - start[k]).abs().max()) for k in start) < 0.2 * min(moved.values())


def test_divergence_names_the_rate() -> None:
    with pytest.raises(KilobayesError) as caught:
        run(Point(), lr=3e17, epochs=6)
    assert "3e+17" in caught.value.wrong
    assert "step" in caught.value.wrong
    assert "3e+16" in caught.value.remedy


def test_only_the_bad_member_dies() -> None:
    calls = []

    def poisoned(output: Any, labels: Tensor) -> Tensor:
        calls.append(1)
        loss = nll(output, labels)
        return loss * torch.tensor([[1.0], [float("nan")]]) if len(calls) >= 3 and len(labels) == 2 else loss

    model = tiny_model(METHOD)
    start = tiny_start(model, [5, 6])
    both = train.fit(model, ROWS, poisoned, Ensemble(Point(), members=2), start, settings(seeds=(5, 6)))
    assert both.diverged == [1]
    alone = run(Point())
    assert_close(tree.member(both.state.theta, 0), alone.state.theta, 1e-5)
    assert torch.isfinite(both.losses[:, 0]).all()
    assert torch.isnan(both.losses[2:, 1]).all()
    assert all(torch.isfinite(v).all() for v in both.state.theta.values())


def test_a_loss_that_blows_up_without_a_nan_ends_its_member() -> None:
    calls: list[int] = []

    def blown(output: Any, labels: Tensor) -> Tensor:
        calls.append(1)
        loss = nll(output, labels)
        return loss * torch.tensor([[1.0], [1000.0]]) if len(calls) == 7 else loss

    model = tiny_model(METHOD)
    start, chosen = tiny_start(model, [5, 6]), settings(seeds=(5, 6))
    both = train.fit(model, ROWS, blown, Ensemble(Point(), members=2), start, chosen)
    assert both.diverged == [1]
    assert torch.isfinite(both.losses).all()
    assert_close(tree.member(both.state.theta, 0), run(Point()).state.theta, 1e-5)
    calls.extend([1] * 10)
    calm = train.fit(model, ROWS, blown, Ensemble(Point(), members=2), start, chosen)
    assert calm.diverged == []


def test_an_exploding_member_is_frozen_too() -> None:
    trained = run(Ensemble(Point(), members=2), seeds=(5, 5), lr=(0.01, 1e12), epochs=4)
    assert trained.diverged == [1]
    assert_close(tree.member(trained.state.theta, 0), run(Point(), epochs=4).state.theta, 1e-5)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model(METHOD)
    model.base_model.model.bert.encoder.layer[1].train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    noise = torch.random.get_rng_state()
    train.fit(model, ROWS, nll, Point(), tiny_start(model, [5]), settings(epochs=1))
    assert [m.training for m in model.modules()] == modes
    assert any(modes)
    assert not all(modes)
    assert not tree.first_difference(before, dict(model.state_dict()))
    assert torch.equal(torch.random.get_rng_state(), noise)
    assert all(layer.installed is None for layer in model.modules() if hasattr(layer, "installed"))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_and_changes_nothing(reentrant: bool) -> None:
    plain = run(Ensemble(Point(), members=2), seeds=(5, 6), accumulate=2)
    model = tiny_model(METHOD)
    model.base_model.model._activation_checkpointing_enable({"use_reentrant": reentrant})
    block = model.base_model.model.bert.encoder.layer[1].attention
    calls: list[bool] = []
    block.register_forward_pre_hook(
        lambda module, args: calls.append(model.base_model.model.bert.encoder.layer[1].training)
    )
    start = tiny_start(model, [5, 6])
    posterior = Ensemble(Point(), members=2)
    trained = train.fit(model, ROWS, nll, posterior, start, settings(seeds=(5, 6), accumulate=2))
    assert len(calls) == 2 * 2 * 8  # twice for each of two micro-batches of eight steps
    assert not any(calls)  # inside, the layer is in evaluation mode: its own dropout stays off
    assert_close(trained.state.theta, plain.state.theta, 1e-6)


def test_autocast() -> None:
    low, full = (run(Point(), autocast=kind).losses for kind in ("bf16", "no"))
    assert not torch.equal(low, full)
    torch.testing.assert_close(low, full, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"batch_size": 0}, {"accumulate": 0}])
def test_settings_outside_their_range(wrong: dict[str, int]) -> None:
    with pytest.raises(KilobayesError, match=next(iter(wrong))):
        settings(**wrong)


def test_misfits_are_named() -> None:
    with pytest.raises(KilobayesError, match="2 learning rates for 1 members"):
        run(Point(), lr=(0.1, 0.2))
    model = tiny_model(METHOD)
    with pytest.raises(KilobayesError, match="stack of 2 members needs 2 seeds"):
        train.fit(model, ROWS, nll, Point(), tiny_start(model, [1, 2]), settings())
    with pytest.raises(KilobayesError, match="no rows"):
        train.fit(model, TinyRows([], torch.empty(0)), nll, Point(), tiny_start(model, [1]), settings())
