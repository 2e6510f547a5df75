"""Monte-Carlo dropout against its definition: Bernoulli columns, and expectations over every mask."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from kilobayes import tree
from kilobayes.posteriors import Ensemble, MCDropout, Point
from kilobayes.posteriors.dropout import mask_like
from kilobayes.random import Streams, generator
from kilobayes.types import Params, Progress

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


@pytest.mark.parametrize("wrong", [{"p": 1.0}, {"p": -0.1}, {"noise": "token"}, {"prior_precision": -1.0}])
def test_settings_outside_their_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MCDropout(**wrong)


def test_a_glob_that_fits_nothing_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match="no leaf matches over='s/C'"):
        MCDropout(over="s/C").init(leaves(), generator(1))
