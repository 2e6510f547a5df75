from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kilobayes import tree
from kilobayes.checkpoint import read_tensors, write_atomically
from kilobayes.posteriors import Ensemble, Laplace, Point, Temperature, ask, linearised
from kilobayes.posteriors.laplace import LaplaceState, curvature_of
from kilobayes.protocols import Jacobian
from kilobayes.random import generator
from kilobayes.testing.posteriors import ToyEnergy, walk
from kilobayes.types import Params, Progress

ENERGY = ToyEnergy.make(40)
THETA = walk([3])[-1]
START = walk([3])[0]


def fitted(method: Laplace, energy: Any = ENERGY, theta: Params = THETA) -> LaplaceState:
    state = method.init(START, generator(1))
    state = method.observe(state, theta, Progress(1, 1, 1, len(energy.labels)))
    return method.fit(state, energy, generator(2))


def design(rows: Tensor) -> np.ndarray:
    """``(N, C, P)``: derivatives of the toy model's scores, a/weight and then b/bias, as flat gives them."""
    out = np.zeros((len(rows), 3, 15))
    for c in range(3):
        out[:, c, c:12:3] = rows.double().numpy()
        out[:, c, 12 + c] = 1.0
    return out


def gauss_newton(theta: Params = THETA) -> np.ndarray:
    """Written out: the sum over rows of J^T (diag(p) - p p^T) J."""
    p = ENERGY.logits(theta)[0].double().softmax(-1).numpy()
    hessian = np.stack([np.diag(row) - np.outer(row, row) for row in p])
    jacobian = design(ENERGY.features)
    return np.einsum("ncp,ncd,ndq->pq", jacobian, hessian, jacobian)


@pytest.mark.parametrize("classes", [2, 3, 9])
def test_root_of_the_hessian(classes: int) -> None:
    scores = 4.0 * torch.randn(50, classes, generator=generator(classes)).double()
    scores[0] = torch.eye(classes)[0] * 60.0  # as confident as scores get
    root, p = linearised.hessian_root(scores), scores.softmax(-1)
    assert root.shape == (50, classes, classes - 1)
    torch.testing.assert_close(
        root @ root.mT, torch.diag_embed(p) - p[:, :, None] * p[:, None], atol=1e-15, rtol=1e-9
    )
    assert linearised.differences(scores)[7].mT.double().mv(scores[7]).equal(scores[7, :-1] - scores[7, -1])


@pytest.mark.parametrize("precision", [0.3, 20.0])
def test_logistic_regression_in_full(precision: float) -> None:
    """Covariance, evidence and the linearised predictive's moments against dense algebra."""
    method = Laplace(structure="full", prior=precision, samples=20_000)
    state = fitted(method)
    matrix = gauss_newton()
    covariance = np.linalg.inv(matrix + precision * np.eye(15))
    draws = tree.flat(method.sample(state, 20_000, generator(4))).double().numpy()
    _same_moments(draws, tree.flat(THETA)[0].double().numpy(), covariance)
    for row in (0, 11):
        jacobian = design(ENERGY.features)[row]
        scores = method.logits(state, ENERGY, 5, generator(5))[:, row].double().numpy()
        assert len(scores) == 20_000  # no fewer than samples
        less = np.array([[1.0, 0.0, -1.0], [0.0, 1.0, -1.0]])
        wanted = less @ jacobian @ covariance @ jacobian.T @ less.T
        _same_moments(scores @ less.T, less @ ENERGY.logits(THETA)[0, row].double().numpy(), wanted)


def _same_moments(draws: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> None:
    """Within five standard errors of a Gaussian's, component by component."""
    variances, count = np.diag(covariance), len(draws)
    assert (np.abs(draws.mean(axis=0) - mean) < 5 * np.sqrt(variances / count)).all()
    error = np.sqrt((covariance**2 + np.outer(variances, variances)) / count)
    assert (np.abs(np.cov(draws.T) - covariance) < 5 * error).all()


def test_evidence_of_logistic_regression() -> None:
    """The Laplace evidence, determinants written out, and where it is largest."""
    state = fitted(Laplace(structure="full", prior="evidence"))
    matrix = gauss_newton()
    distance = float((tree.flat(THETA) - tree.flat(START)).double().square().sum())

    def wanted(precision: float) -> float:
        return -0.5 * (precision * distance + np.linalg.slogdet(np.eye(15) + matrix / precision)[1])

    found = curvature_of(state, 0)
    for precision in (0.01, 1.0, 300.0):
        assert linearised.evidence(found, distance, precision) == pytest.approx(wanted(precision), rel=1e-5)
    grid = np.geomspace(0.01, 100.0, 4001)
    best = grid[np.argmax([wanted(p) for p in grid])]
    assert float(state.precision) == pytest.approx(best, rel=5e-3)
    assert not state.center  # not needed any more, and not stored
    method = Laplace(structure="full", prior="evidence")  # around zero, for weights whose start nobody knows
    state = method.fit(replace(method.init(THETA, generator(1)), center={}), ENERGY, generator(2))
    distance = float(tree.flat(THETA).double().square().sum())
    assert float(state.precision) == pytest.approx(grid[np.argmax([wanted(p) for p in grid])], rel=5e-3)


def test_validated_precision_is_the_best_of_all() -> None:
    """Two classes: NLL of the averaged probabilities by quadrature, over a fine grid."""
    energy = Narrow.make()
    method = Laplace(structure="full", prior="validation", tempered=False, samples=1000)
    state = fitted(method, energy, {"a/weight": torch.tensor([[2.5]])})
    matrix = float(
        (0.01 * energy.features.double().square() * energy.slope({"a/weight": torch.tensor([[2.5]])})).sum()
    )
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)

    def nll(precision: float) -> float:
        x = energy.features.double().numpy()
        score = 2.5 * x[:, None] + np.abs(x)[:, None] * nodes / math.sqrt(matrix + precision)
        p = (weights / weights.sum() / (1 + np.exp(-score))).sum(axis=1)
        return float(-np.log(np.where(energy.labels.numpy() == 0, p, 1 - p)).sum())

    best = min(nll(p) for p in np.geomspace(1e-3, 1e7, 2000))
    assert nll(float(state.precision)) < best + 0.01
    assert nll(1e7) > best + 1.0 < nll(1e-3)
    assert Laplace().calibrates
    assert not Laplace(prior="evidence").calibrates
    assert not Laplace(prior=1.0).calibrates


@dataclass(frozen=True, eq=False)
class Narrow:
    """One weight, two classes, scores (w x, 0); noisy labels, so that a large weight is too confident."""

    features: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.features)

    @classmethod
    def make(cls) -> Narrow:
        x = torch.randn(60, generator=generator(6))
        return cls(x, (torch.rand(60, generator=generator(7)) > (0.9 * x).sigmoid()).long())

    @property
    def train(self) -> Narrow:
        return Narrow(0.1 * self.features[:4], self.labels[:4])

    def slope(self, theta: Params) -> Tensor:
        p = (self.train.features.double() * theta["a/weight"].double()[0]).sigmoid()
        return torch.cat([p * (1 - p), torch.zeros(len(self.features) - 4)])

    def logits(self, theta: Params) -> Tensor:
        score = theta["a/weight"] * self.features
        return torch.stack([score, torch.zeros_like(score)], dim=-1)

    def jacobians(self, theta: Params, keys: list[str], combine: Any) -> Any:
        for rows in torch.arange(len(self.labels)).split(17):
            logits = self.logits(theta)[0, rows]
            yield Jacobian(
                rows, logits, {"a/weight": self.features[rows, None, None] * combine(logits)[:, :1].mT}
            )


def test_probabilities_are_averaged_never_scores() -> None:
    """Scores (2, 0) of variance 9 each: 0.67 by quadrature, where the mean scores say 0.88."""
    energy = Narrow(torch.ones(5), torch.zeros(5, dtype=torch.long))
    method = Laplace(structure="diag", prior=1.0, samples=40_000)
    state = replace(
        fitted(method, energy, {"a/weight": torch.tensor([[2.0]])}), precision=torch.tensor([1 / 18])
    )
    state = replace(state, values={"a/weight": torch.zeros(1, 1, 1)})
    found = ask.predictive(method, state, energy, 10, generator(3)).softmax(-1).mean(0)[:, 0]
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    wanted = float((weights / weights.sum() / (1 + np.exp(-2 - 18**0.5 * nodes))).sum())
    assert wanted == pytest.approx(0.67, abs=0.01)
    assert found.tolist() == pytest.approx([wanted] * 5, abs=5 * 0.5 / math.sqrt(40_000))
    assert 1 / (1 + math.exp(-2)) == pytest.approx(0.88, abs=0.001)


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_a_strong_prior_is_the_point(structure: str) -> None:
    method = Laplace(structure=structure, prior=1e12)
    state = fitted(method)
    torch.testing.assert_close(
        method.logits(state, ENERGY, 3, generator(1))[0].log_softmax(-1),
        ENERGY.logits(THETA)[0].log_softmax(-1), atol=1e-4, rtol=0.0,
    )  # fmt: skip
    drawn = method.sample(state, 3, generator(1))
    torch.testing.assert_close(tree.flat(drawn), tree.flat(THETA).expand(3, -1), atol=1e-5, rtol=0.0)


def test_over_the_head_or_a_glob() -> None:
    drawn = {}
    for over in ("*", "head", "*/bias"):
        method = Laplace(over=over, prior=1.0)
        drawn[over] = method.sample(fitted(method), 2, generator(1))
    assert drawn["*"]["a/weight"].equal(drawn["head"]["a/weight"])  # the toy's leaves are called as a head's
    assert drawn["*/bias"]["a/weight"].equal(THETA["a/weight"].expand(2, -1, -1))
    assert not drawn["*/bias"]["b/bias"].equal(THETA["b/bias"].expand(2, -1))
    leaves = {"x/A": torch.ones(1, 2), "y/weight": torch.ones(1, 2), "y/weight~rho": torch.ones(1, 2)}
    assert Laplace(over="head").keys(leaves) == ["y/weight"]
    assert Laplace(over="*").keys(leaves) == ["x/A", "y/weight"]
    with pytest.raises(ValueError, match="leaves are called A, weight"):
        Laplace(over="*/B").init(leaves, generator(1))


def test_a_number_is_the_prior_that_trains() -> None:
    """The penalty of a point with that precision, around the start."""
    progress = Progress(1, 3, 3, 40)
    method, point = Laplace(prior=2.5), Point(2.5)
    mine = method.penalty(method.init(START, generator(1)), THETA, progress)
    torch.testing.assert_close(mine, point.penalty(point.init(START, generator(1)), THETA, progress))
    assert float(mine) > 0
    for prior in ("evidence", "validation"):
        method = Laplace(prior=prior)
        assert method.penalty(method.init(START, generator(1)), THETA, progress).tolist() == [0.0]


def test_members_are_fitted_one_by_one(tmp_path: Any) -> None:
    both = walk([3, 4])[-1]
    method = Ensemble(Laplace(prior="evidence", rank=2, samples=9), members=2)
    state = ask.fit(method, method.base.init(both, generator(1)), ENERGY, generator(2))
    alone = [
        method.base.fit(method.base.init(tree.member(both, k), generator(1)), ENERGY, generator(2))
        for k in (0, 1)
    ]
    flat = tree.flatten_state(state)
    for name, value in tree.flatten_state(tree.concatenate_states(alone)).items():
        torch.testing.assert_close(flat[name], value)
    scores = ask.logits(method, state, ENERGY, 6, generator(3))
    assert scores.shape == (9, 40, 3)
    centers = [ENERGY.logits(tree.member(both, k))[0].log_softmax(-1) for k in (0, 1)]
    for part, own, other in (
        (scores[:5], 0, 1),
        (scores[5:], 1, 0),
    ):  # five draws of the first, four of the second
        mean = part.log_softmax(-1).mean(dim=0)
        assert (mean - centers[own]).norm() < 0.5 * (mean - centers[other]).norm()
    write_atomically(tmp_path / "s", tree.flatten_state(state))
    back = tree.unflatten_state(method, read_tensors(tmp_path / "s")[0])
    assert ask.logits(method, back, ENERGY, 6, generator(3)).equal(scores)


def test_temperature_around_it_scales_linearised_scores() -> None:
    method = Temperature(Laplace(structure="full", samples=300))
    state = method.init(THETA, generator(1))
    state = method.fit(state, ENERGY, generator(2))
    raw = method.base.logits(state.inner, ENERGY, 4, generator(3))
    out = ask.predictive(method, state, ENERGY, 4, generator(3))
    torch.testing.assert_close(out, raw / state.temperature)
    assert len(out) == 300
    sampled = Laplace(structure="full", linearised=False, prior=1.0)
    drawn = ask.predictive(sampled, fitted(sampled), ENERGY, 4, generator(3))
    torch.testing.assert_close(drawn, ENERGY.logits(sampled.sample(fitted(sampled), 4, generator(3))))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"structure": "kfac"}, "'kron', 'diag' or 'full'"),
        ({"rank": 0}, "at least 1"),
        ({"samples": 0}, "at least 1"),
        ({"prior": "marglik"}, "'validation', 'evidence' or a number"),
        ({"prior": 0.0}, "above 0"),
        ({"prior": math.inf}, "above 0"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Laplace(**settings)


def test_a_full_matrix_over_too_much_is_refused_before_training() -> None:
    with pytest.raises(
        ValueError, match=r"over 5000 numbers is too large \(at most 4096\): take structure='kron'"
    ):
        Laplace(structure="full").init({"x/A": torch.zeros(1, 50, 100)}, generator(1))


def test_tempered_validation_looks_after_the_best_temperature() -> None:
    """Scores three times too large: a weak prior hides that; a temperature leaves nothing to hide."""
    gen = generator(8)
    truth = torch.randn(3000, 2, generator=gen).double()
    labels = torch.multinomial(truth.softmax(-1), 1, generator=gen)[:, 0]
    noise = torch.randn(1, 40, 3000, 2, generator=gen).double()
    widths = (1.0 / linearised.GRID).sqrt().view(-1, 1, 1, 1)

    def batches() -> Any:
        for rows in torch.arange(3000).split(500):
            yield rows, 3.0 * truth[rows] + widths * noise[:, :, rows]

    plain, tempered = (linearised.validated(batches(), labels, flag) for flag in (False, True))
    assert plain < 2.0 < 10.0 < tempered


def test_rows_without_labels_are_predicted_alike() -> None:
    """Those of a run in use have none."""
    method = Laplace(prior=1.0)
    state = fitted(method)
    unlabelled = ToyEnergy(ENERGY.features, torch.empty(0, dtype=torch.long))
    found, expected = (method.logits(state, e, 20, generator(3)) for e in (unlabelled, ENERGY))
    assert torch.equal(found, expected)
