"""Monte-Carlo dropout against its definition: Bernoulli columns, and expectations over every mask."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from kilobayes import train, tree
from kilobayes.adapters import LoRA
from kilobayes.errors import KilobayesError
from kilobayes.options import Options
from kilobayes.posteriors import Ensemble, MCDropout, Point, Scale
from kilobayes.posteriors.dropout import mask_like
from kilobayes.predict import logits
from kilobayes.random import Streams, generator
from kilobayes.tasks.data import load_examples
from kilobayes.testing.tiny import TinyRows, TinyTask, nll, tiny_model, tiny_start
from kilobayes.thin import drawn
from kilobayes.types import Params, Progress
from kilobayes.workflows import run as work
from kilobayes.workflows.finetune import load

from .. import small

PROGRESS = Progress(1, 10, 5, 40)


def leaves(members: int = 2) -> Params:
    gen = generator(4)
    shapes = {"s/A": (3, 5), "s/B": (6, 3), "s/vector": (4,), "s/bank": (2, 3, 4)}
    return {key: 1.0 + torch.rand(members, *shape, generator=gen) for key, shape in shapes.items()}


def streams(*seeds: int) -> Streams:
    return Streams([generator(seed, 1) for seed in seeds])


@pytest.mark.parametrize("over", ["", "s/vector", "s/bank", "*"])
@pytest.mark.parametrize("p", [0.1, 0.4])
def test_a_mask_for_every_row_keeps_or_drops_whole_columns(over: str, p: float) -> None:
    method, theta, rows = MCDropout(p=p, over=over), leaves(), 4000
    drawn = method.perturb(method.init(theta, generator(1)), theta, rows, streams(1, 2), PROGRESS)
    for key in theta:
        factor = drawn[key].unflatten(0, (2, rows)) / theta[key][:, None]  # 1 / (1 - p) up to rounding
        if key not in tree.chosen(theta, over):
            assert bool((factor == 1.0).all())
            continue
        kept = factor > 0
        torch.testing.assert_close(factor[kept], torch.full_like(factor[kept], 1 / (1 - p)))
        column = mask_like(kept.flatten(0, 1))
        assert bool((kept.flatten(0, 1) == column).all())
        error = (p * (1 - p) / (2 * rows)) ** 0.5
        assert bool((column.float().mean(dim=0) - (1 - p)).abs().max() < 5 * error)
        if key == "s/A" and p == 0.4:  # rows, members and columns have masks of their own
            assert len(column[:rows].flatten(1).unique(dim=0)) == 2**5
            assert not torch.equal(column[:rows], column[rows:])


def test_a_member_draws_what_it_would_alone() -> None:
    method, theta = MCDropout(p=0.5, over="*"), leaves(3)
    state = method.init(theta, generator(1))
    together = method.perturb(state, theta, 7, streams(1, 2, 3), PROGRESS)
    for at, seed in enumerate((1, 2, 3)):
        one = tree.member(theta, at)
        alone = method.perturb(method.init(one, generator(1)), one, 7, streams(seed), PROGRESS)
        assert not tree.first_difference(alone, tree.member(together, slice(7 * at, 7 * at + 7)))


def test_a_mask_a_step() -> None:
    """Four rows' worth of adapters is not made; the draw is that of a single row."""
    step, row, theta = MCDropout(p=0.5, noise="step"), MCDropout(p=0.5), leaves()
    state = step.init(theta, generator(1))
    ours = step.perturb(state, theta, 4, streams(1, 2), PROGRESS)
    assert tree.size(ours) == 2
    assert not tree.first_difference(ours, row.perturb(state, theta, 1, streams(1, 2), PROGRESS))


def test_draws_are_functions_with_the_mean_of_the_trained_leaf() -> None:
    method, theta, count = MCDropout(p=0.3), leaves(2), 20_000
    state = method.observe(method.init(theta, generator(1)), theta, Progress(10, 10, 5, 40))
    draws = method.sample(state, count, generator(6))
    assert method.support(state) is None
    assert not tree.first_difference(tree.member(draws, 0) | {"s/A": theta["s/A"][:1]}, tree.member(theta, 0))
    for member, part in enumerate(draws["s/A"].split(count // 2)):
        factor = part / theta["s/A"][member]
        assert bool(((factor > 0) == (factor[:, :1] > 0)).all())
        error = (0.3 / 0.7 / (count // 2)) ** 0.5  # the variance of a factor is p / (1 - p)
        assert bool((factor[:, 0].mean(dim=0) - 1).abs().max() < 5 * error)
        correlation = torch.corrcoef(factor[:, 0].T) - torch.eye(5)
        assert float(correlation.abs().max()) < 5 / (count // 2) ** 0.5
    assert not tree.first_difference(method.mean(state), theta)


def test_nothing_dropped_is_a_point() -> None:
    method, point, theta = MCDropout(p=0.0, prior_precision=2.0), Point(2.0), leaves()
    state = method.init(theta, generator(1))
    assert method.perturb(state, theta, 7, streams(1, 2), PROGRESS) is theta
    assert method.support(state) == 2
    assert not tree.first_difference(
        method.sample(state, 5, generator(1)), point.sample(state, 5, generator(2))
    )
    moved = tree.map_params(lambda t: t + 0.1, theta)
    assert torch.equal(method.penalty(state, moved, PROGRESS), point.penalty(state, moved, PROGRESS))


@pytest.mark.parametrize(("p", "precision"), [(0.1, 1.0), (0.6, 7.0)])
def test_penalty_is_the_expected_prior_over_all_masks(p: float, precision: float) -> None:
    """lambda / (2 N) times the expectation of the squared distance from the start, over all 2^5 masks."""
    method, start = MCDropout(p=p, prior_precision=precision), leaves(1)
    state = method.init(start, generator(1))
    theta = tree.map_params(lambda t: t.double() - 0.7, start)
    expected = 0.0
    for mask in itertools.product((0.0, 1.0), repeat=5):
        kept = int(sum(mask))
        drawn = theta | {"s/A": theta["s/A"] * torch.tensor(mask).double() / (1 - p)}
        square = sum(float((drawn[k] - start[k]).square().sum()) for k in drawn)
        expected += p ** (5 - kept) * (1 - p) ** kept * precision / (2 * 40) * square
    assert float(method.penalty(state, theta, PROGRESS)) == pytest.approx(expected, rel=1e-9)


def test_members_of_an_ensemble_share_the_draws() -> None:
    method, theta = Ensemble(MCDropout(p=0.5), members=2), leaves(2)
    draws = method.sample(method.init(theta, generator(1)), 6, generator(2))
    assert torch.equal(draws["s/B"], theta["s/B"][[0, 0, 0, 1, 1, 1]])
    kept = draws["s/A"] > 0
    torch.testing.assert_close(draws["s/A"][kept], (2 * theta["s/A"][[0, 0, 0, 1, 1, 1]])[kept])


TOKEN = MCDropout(p=0.3, noise="token", prior_precision=2.0)


def test_masks_of_tokens_leave_the_weights_alone() -> None:
    """A draw is the weights and a seed; the penalty is a point's; a member draws what it would alone."""
    theta, point = leaves(2), Point(2.0)
    state = TOKEN.init(theta, generator(1))
    first, second = (TOKEN.sample(state, 6, generator(seed)) for seed in (1, 2))
    assert not tree.first_difference(tree.plain(first), point.sample(state, 6, generator(1)))
    assert not tree.first_difference(TOKEN.mean(state), theta)
    assert TOKEN.support(state) is None
    seeds = torch.stack([d["s/~tokens"] for d in (first, second)])
    assert len(seeds[..., 0].unique()) == 12
    assert bool((seeds[..., 1] == round(0.7 * 2**16)).all())
    stream = streams(1, 2)
    steps = [TOKEN.perturb(state, theta, 7, stream, PROGRESS) for _ in range(2)]
    assert len(torch.cat([s["s/~tokens"][:, 0] for s in steps]).unique()) == 4
    assert all(tree.plain(s)[key] is theta[key] for s in steps for key in theta)
    alone = TOKEN.perturb(state, tree.member(theta, 1), 7, streams(2), PROGRESS)
    assert torch.equal(alone["s/~tokens"], steps[0]["s/~tokens"][1:])
    moved = tree.map_params(lambda t: t + 0.1, theta)
    assert torch.equal(TOKEN.penalty(state, moved, PROGRESS), point.penalty(state, moved, PROGRESS))
    assert set(MCDropout(noise="token", over="*").sample(state, 1, generator(1))) == {*theta, "s/~tokens"}
    assert set(MCDropout(p=0.0, noise="token").sample(state, 1, generator(1))) == set(theta)


def trained(posterior: Any, **changes: Any) -> Any:
    model = tiny_model(LoRA(r=2))
    settings = train.Settings(**{"lr": 0.02, "epochs": 2, "batch_size": 8, "seeds": (4,), **changes})
    start = tiny_start(model, list(settings.seeds))
    return train.fit(model, TinyRows.make(20), nll, posterior, start, settings)


def test_training_with_masks_of_tokens() -> None:
    """They are used; micro-batches and the other members of a stack change nothing."""
    alone = trained(TOKEN).state.theta
    assert tree.first_difference(alone, trained(Point(2.0)).state.theta)
    for other in (trained(TOKEN, accumulate=3), trained(Ensemble(TOKEN, members=2), seeds=(4, 9))):
        for key, value in tree.member(other.state.theta, 0).items():
            torch.testing.assert_close(value, alone[key], rtol=1e-4, atol=1e-5)


def test_predictions_of_masks_of_tokens_repeat_whatever_the_batches() -> None:
    model, rows = tiny_model(LoRA(r=2)), TinyRows.make(21, seed=3)
    state = trained(TOKEN).state
    order = torch.randperm(21, generator=generator(8))
    task: Any = TinyTask()

    def scores(rows: Any, seed: int, size: int, chunk: int = 1 << 15) -> torch.Tensor:
        return logits(
            model,
            TOKEN.sample(state, 5, generator(seed)),
            task,
            rows,
            batch_size=size,
            tokens_in_flight=chunk,
        )

    expected = scores(rows, 1, 32)
    assert len(expected.flatten(1).unique(dim=0)) == 5
    assert torch.equal(scores(rows, 1, 32), expected)
    for size, chunk in ((1, 1 << 15), (4, 1 << 15), (8, 100)):
        torch.testing.assert_close(scores(rows, 1, size, chunk), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores(rows.take(order), 1, 8), expected[:, order], rtol=1e-4, atol=1e-5)
    assert bool((scores(rows, 2, 32) - expected).abs().amax(dim=(1, 2)).min() > 1e-3)


def test_a_run_with_masks_of_tokens_is_read_back_and_is_not_made_smaller(tmp_path: Path) -> None:
    options = Options(
        model=small.base(),
        out=str(tmp_path / "run"),
        epochs=1,
        lr=0.02,
        adapter="LoRA(r=2)",
        posterior=repr(TOKEN),
    )
    done = work.train(options, source=small.rows(30, 1))
    again = load(done.folder)
    texts = load_examples(small.rows(9, 5))
    ours, theirs = (fitted.predict(texts, samples=4).logits for fitted in (done.fitted, again))
    assert torch.equal(ours, theirs)
    with pytest.raises(KilobayesError, match="masks of tokens, not in weights"):
        drawn(again.posterior, again.state, 2, generator(1))
    with pytest.raises(ValueError, match="of='scores'"):
        Scale(TOKEN, of="weights")
    assert Scale(TOKEN).of_scores(Scale(TOKEN).init(again.posterior.mean(again.state), generator(1)))


@pytest.mark.parametrize("wrong", [{"p": 1.0}, {"p": -0.1}, {"noise": "tokens"}, {"prior_precision": -1.0}])
def test_settings_outside_their_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MCDropout(**wrong)


def test_a_glob_that_fits_nothing_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match="no leaf matches over='s/C'"):
        MCDropout(over="s/C").init(leaves(), generator(1))
