from __future__ import annotations

import dataclasses

import pytest
import torch

from kilobayes import tree
from kilobayes.posteriors import SWAG, Ensemble, Point, Scale, Temperature, ask
from kilobayes.predict import Predictive
from kilobayes.random import generator
from kilobayes.testing.posteriors import observed, walk


def test_information_is_taken_over_all_draws_of_all_members() -> None:
    """Two members certain of different classes: ln 2; averaging a member's scores first would give 0."""
    logits = torch.tensor([[[50.0, 0.0]], [[50.0, 0.0]], [[0.0, 50.0]], [[0.0, 50.0]]])
    assert float(Predictive(logits).mutual_info) == pytest.approx(torch.log(torch.tensor(2.0)).item())
    assert float(Predictive(logits[:2]).mutual_info) == 0.0
    within = Predictive(torch.tensor([[[9.0, 0.0]], [[0.0, 9.0]], [[9.0, 0.0]], [[0.0, 9.0]]]))
    assert float(within.mutual_info) > 0.5  # members agree on average, their draws do not


def test_averaged_probabilities_are_never_worse_than_the_average_member() -> None:
    gen = generator(1)
    logits = 3 * torch.randn(4, 50, 3, generator=gen, dtype=torch.float64)
    labels = torch.randint(3, (50,), generator=gen)
    rows = torch.arange(50)
    mixture = -Predictive(logits).probs[rows, labels].log()
    each = -logits.log_softmax(-1)[:, rows, labels].mean(dim=0)
    assert (mixture <= each + 1e-12).all()


@pytest.mark.parametrize(
    ("n", "counts"), [(2, [1, 1, 0]), (3, [1, 1, 1]), (7, [3, 2, 2]), (30, [10, 10, 10])]
)
def test_members_are_drawn_equally_often(n: int, counts: list[int]) -> None:
    method = Ensemble(Point(), members=3)
    state = method.init({"s/x": torch.arange(3.0)[:, None]}, generator(1))
    drawn = method.sample(state, n, generator(2))["s/x"][:, 0].long()
    assert torch.bincount(drawn, minlength=3).tolist() == counts


def test_draws_of_multiswag_stay_with_their_member() -> None:
    method = Ensemble(SWAG(rank=2, start=0.0, snapshots=9), members=2)
    steps = walk([1, 2], 5)
    trajectory = [
        {k: v + 1000 * torch.arange(2.0).view(2, *[1] * (v.dim() - 1)) for k, v in t.items()} for t in steps
    ]
    drawn = tree.flat(method.sample(observed(method, trajectory), 9, generator(1)))
    assert (drawn[:5].abs() < 100).all()
    assert ((drawn[5:] - 1000).abs() < 100).all()


def test_how_many_draws_prediction_takes() -> None:
    points = Ensemble(Point(), members=3)
    state = points.init(walk([1, 2, 3])[0], generator(1))
    assert tree.size(points.sample(state, ask.count(points, state, 10), generator(1))) == 3
    gaussians = Ensemble(SWAG(start=0.0, snapshots=9), members=3)
    fitted = observed(gaussians, walk([1, 2, 3]))
    assert tree.size(gaussians.sample(fitted, ask.count(gaussians, fitted, 10), generator(1))) == 10
    assert tree.size(gaussians.sample(fitted, ask.count(gaussians, fitted, 2), generator(1))) == 3


@pytest.mark.parametrize(("factors", "distinct"), [([0.0, 0.0, 0.0], 3), ([0.0, 4.0, 0.0], None)])
def test_members_of_no_width_among_others(factors: list[float], distinct: int | None) -> None:
    """One draw each where no member has any width; as long as one has, the mixture is continuous."""
    method = Ensemble(Scale(SWAG(start=0.0, snapshots=9)), members=3)
    fitted = observed(method, walk([1, 2, 3]))
    state = dataclasses.replace(fitted, factor=torch.tensor(factors))
    assert method.support(state) == distinct
    drawn = tree.flat(method.sample(state, ask.count(method, state, 9), generator(1)))
    assert len(drawn) == (distinct or 9)
    center = tree.flat(method.mean(state))
    for k, own in enumerate(drawn.chunk(3)):
        assert bool((own == center[k]).all()) == (factors[k] == 0.0)


def test_members_of_wrapped_posteriors() -> None:
    assert ask.members(Point()) == 1
    assert ask.members(Temperature(Ensemble(SWAG(), members=4))) == 4
    assert ask.members(Ensemble(Temperature(SWAG()), members=2)) == 2


def test_what_an_ensemble_cannot_be() -> None:
    with pytest.raises(ValueError, match="members"):
        Ensemble(Point(), members=0)
    with pytest.raises(ValueError, match="larger ensemble"):
        Ensemble(Temperature(Ensemble(Point(), members=2)))
