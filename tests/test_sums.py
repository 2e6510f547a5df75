from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kilobayes import sums, tree
from kilobayes.errors import KilobayesError
from kilobayes.posteriors import SWAG, Ensemble, Point, Scale, Temperature
from kilobayes.posteriors.point import PointState
from kilobayes.posteriors.scale import ScaleState
from kilobayes.posteriors.temperature import TemperatureState
from kilobayes.random import generator
from kilobayes.testing.posteriors import observed, walk

METHODS = [SWAG(rank=4, start=0.0, snapshots=9), SWAG(rank=3, start=0.0, snapshots=6, scale=2.0)]
DIAGONAL = SWAG(rank=0, start=0.0, snapshots=9, scale=0.5)


def swag(method: SWAG, seed: int) -> Any:
    return observed(method, walk([seed], 12))


def covariance(method: SWAG, state: Any) -> np.ndarray:
    """By the definition: half of the diagonal and half of the deviations, or the whole diagonal."""
    variance = tree.flat(state.squares)[0].double().numpy() / float(state.count[0])
    if not method.rank:
        return method.scale * np.diag(variance)
    d = torch.cat([v[0].flatten(1) for v in state.deviations.values()], dim=1).double().numpy().T
    return method.scale * (np.diag(variance) / 2 + d @ d.T / (2 * (d.shape[1] - 1)))


@pytest.mark.parametrize("methods", [METHODS, [METHODS[0], DIAGONAL], [DIAGONAL, DIAGONAL]])
def test_moments_of_a_sum(methods: list[SWAG]) -> None:
    terms = [(m, swag(m, seed)) for m, seed in zip(methods, (1, 2), strict=True)]
    keys = list(terms[0][1].average)
    weights = [dict.fromkeys(keys, 0.7), {k: -0.4 if k == keys[0] else 1.5 for k in keys}]
    method, state = sums.moments(terms, weights)
    rows = [
        np.concatenate([np.full(s.average[k][0].numel(), w[k]) for k in keys])
        for (_, s), w in zip(terms, weights)
    ]
    mean = sum(r * tree.flat(s.average)[0].double().numpy() for r, (_, s) in zip(rows, terms))
    np.testing.assert_allclose(tree.flat(state.average)[0], mean, atol=1e-5)
    wanted = sum(np.outer(r, r) * covariance(m, s) for r, (m, s) in zip(rows, terms))
    found = covariance(method, state)
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
    assert method.rank == sum(m.rank for m in methods)
    draws = tree.flat(method.sample(state, 4000, generator(3))).double()
    spread = np.sqrt(np.diag(wanted))
    order = sorted(keys)
    assert order == keys
    assert (np.abs(draws.std(0).numpy() / spread - 1) < 5 / np.sqrt(2 * 4000)).all()


def test_what_is_a_gaussian() -> None:
    state = swag(METHODS[0], 1)
    scaled: Any = ScaleState(state, torch.tensor([0.25]))
    found = sums.gaussian(Temperature(Scale(METHODS[0])), TemperatureState(scaled, torch.tensor([2.0])))
    assert found is not None
    assert found[0].scale == pytest.approx(0.25)
    assert found[1] is state
    assert sums.gaussian(Point(), PointState(walk([1])[0], {})) is None
    two = observed(METHODS[0], walk([1, 2], 12))
    assert sums.gaussian(Ensemble(METHODS[0], members=2), two) is None


def test_sums_means_and_draws() -> None:
    a, b = walk([1])[0], walk([2])[0]
    found = sums.total([a, b], [dict.fromkeys(a, 2.0), dict.fromkeys(b, -1.0)])
    assert all(torch.allclose(found[k], 2 * a[k] - b[k]) for k in a)
    point: Any = PointState(a, {})
    assert sums.still(Point(), point)
    assert not sums.still(METHODS[0], swag(METHODS[0], 1))
    tempered: Any = TemperatureState(point, torch.ones(1))
    assert torch.equal(
        tree.flat(sums.draws(Temperature(), tempered, 3, generator(1))), tree.flat(a).repeat(3, 1)
    )
    two: Any = PointState(tree.concatenate([a, b]), {})
    with pytest.raises(KilobayesError, match="ensemble"):
        sums.mean(Ensemble(Point(), members=2), two, "runs/a")
