from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from kilobayes import tree
from kilobayes.posteriors import SWA, TFB, Ensemble, Point, Temperature, ask
from kilobayes.posteriors.point import PointState
from kilobayes.posteriors.tfb import TFBState, directions, largest, moved, whitening
from kilobayes.random import generator
from kilobayes.types import Params

OUT, IN, RANK = 7, 5, 3


def leaves(members: int = 1, seed: int = 0) -> Params:
    """Factors of a pair, badly conditioned, and a head."""
    gen = generator(seed, 1)
    b = torch.randn(members, OUT, RANK, generator=gen) * torch.tensor([3.0, 0.5, 0.05])
    a = torch.randn(members, RANK, IN, generator=gen)
    return {"s/A": a, "s/B": b, "head/weight": torch.randn(members, 3, OUT, generator=gen)}


def updates(theta: Params) -> Tensor:
    return (theta["s/B"].double() @ theta["s/A"].double()).flatten(1)


def state(theta: Params, sigma: float = 0.3) -> TFBState:
    return TFBState(PointState(theta, {}), torch.full((tree.size(theta),), sigma))


@dataclass(frozen=True, eq=False)
class Model:
    """A pair of factors and a head on features; ``copies`` of every row."""

    x: Tensor
    truth: Tensor
    copies: int = 1
    asked: Any = None

    @property
    def labels(self) -> Tensor:
        return self.truth.repeat(self.copies)

    @property
    def train(self) -> Model:
        return self

    def part(self, rows: int) -> Model:
        return self

    def logits(self, theta: Params) -> Tensor:
        hidden = torch.einsum("ni,sri,sor->sno", self.x, theta["s/A"], theta["s/B"])
        out = torch.einsum("sno,sco->snc", hidden, theta["head/weight"])
        if self.asked is not None:
            self.asked.append(tree.size(theta))
        return out.repeat(1, self.copies, 1)


def model(copies: int = 1) -> Model:
    gen = generator(8)
    x = torch.randn(30, IN, generator=gen)
    scores = Model(x, torch.zeros(30)).logits(leaves())[0]  # labels that the point knows something of
    return Model(x, torch.multinomial((scores / 2).softmax(-1), 1, generator=gen)[:, 0], copies, [])


def test_noise_of_the_update_is_isotropic_in_the_columns_of_b() -> None:
    """Covariance of vec(B A') over draws: sigma squared, times U U^T for each column, none across columns."""
    theta, sigma, count = leaves(), 0.3, 40_000
    drawn = updates(TFB().sample(state(theta, sigma), count, generator(2))).view(count, OUT, IN)
    noise = (drawn - updates(theta).view(1, OUT, IN)).permute(0, 2, 1).reshape(count, IN * OUT)
    u = torch.linalg.svd(theta["s/B"][0].double(), full_matrices=False)[0]
    expected = sigma**2 * torch.kron(torch.eye(IN, dtype=torch.float64), u @ u.T)
    found = noise.T @ noise / count
    diagonal = expected.diagonal()
    error = ((diagonal[:, None] * diagonal + expected**2) / count).sqrt()
    assert bool(((found - expected).abs() < 5.5 * error + 1e-9).all())
    assert bool((noise.mean(0).abs() < 5.5 * (diagonal / count).sqrt()).all())


def test_the_law_does_not_depend_on_how_the_product_is_factored() -> None:
    """(B R, R^-1 A): the same update, and noise B A' that differs by a rotation of the standard noise."""
    theta = leaves()
    r = torch.randn(RANK, RANK, generator=generator(4)) + 2 * torch.eye(RANK)
    other = theta | {"s/B": theta["s/B"] @ r, "s/A": torch.linalg.inv(r) @ theta["s/A"]}
    torch.testing.assert_close(updates(theta), updates(other), rtol=1e-4, atol=1e-4)
    factors = [t["s/B"][0].double() @ whitening(t["s/B"])[0] for t in (theta, other)]
    one, two = (f @ f.T for f in factors)
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert float(one.trace()) == pytest.approx(RANK, rel=1e-6)


def test_mean_and_what_is_no_a_stay() -> None:
    theta = leaves(2)
    method, fitted = TFB(), state(theta)
    assert not tree.first_difference(method.mean(fitted), theta)
    drawn = method.sample(fitted, 5, generator(1))
    who = tree.spread(2, 5)
    for key in ("s/B", "head/weight"):
        assert torch.equal(drawn[key], theta[key][who])
    assert bool((drawn["s/A"] != theta["s/A"][who]).all())
    still = method.sample(state(theta, 0.0), 5, generator(1))
    assert not tree.first_difference(still, tree.member(theta, who))
    assert method.support(fitted) is None
    assert method.support(state(theta, 0.0)) == 2


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_rank_deficient_factors(kept: int) -> None:
    theta = leaves()
    theta["s/B"][:, :, kept:] = 1e-12 * theta["s/B"][:, :, kept:] if kept else 0.0
    w = whitening(theta["s/B"])[0]
    b = theta["s/B"][0].double()
    assert bool(w.isfinite().all())
    assert float((b @ w @ w @ b.T).trace()) == pytest.approx(kept, abs=1e-6)
    assert float(w.abs().max()) < 1e3
    method, some = TFB(), model()
    fitted = method.fit(state(theta, 0.0), some, generator(1))  # type: ignore[arg-type]
    assert bool(fitted.sigma.isfinite().all())
    assert (method.support(fitted) is None) == bool(kept)


def test_bfloat16() -> None:
    theta = tree.map_params(lambda t: t.bfloat16(), leaves())
    drawn = TFB().sample(state(theta), 4, generator(1))
    assert {v.dtype for v in drawn.values()} == {torch.bfloat16}
    assert bool((drawn["s/A"] != theta["s/A"]).any())


def nll(logits: Tensor, labels: Tensor) -> float:
    p = logits.double().softmax(-1).mean(0)
    return float(-p[torch.arange(len(labels)), labels].log().mean())


@pytest.mark.parametrize("tolerance", [0.003, 0.2])
@pytest.mark.parametrize("labels", ["own", "true"])
def test_the_width_is_tolerated_and_the_next_one_is_not(tolerance: float, labels: str) -> None:
    method = TFB(tolerance=tolerance, labels=labels, bisections=5, samples=6)
    some, theta = model(), leaves()
    fitted = method.fit(state(theta, 0.0), some, generator(3))  # type: ignore[arg-type]
    sigma = float(fitted.sigma)
    truth = some.logits(theta)[0].argmax(-1) if labels == "own" else some.labels
    noise = directions(theta, 6, "", generator(3))

    def after(width: float) -> float:
        return nll(some.logits(moved(theta, noise, torch.full((6,), width))), truth)

    before = nll(some.logits(theta), truth)
    assert after(sigma) <= before * (1 + tolerance) < after(sigma * 4 ** (1 / 32))
    assert 1e-6 < sigma < 10
    larger = TFB(tolerance=3 * tolerance, labels=labels, bisections=5, samples=6)
    assert float(larger.fit(state(theta, 0.0), some, generator(3)).sigma) > sigma  # type: ignore[arg-type]


def test_accuracy_as_the_measure() -> None:
    some, theta = model(), leaves()
    method = TFB(measure="accuracy", tolerance=0.1, samples=6, bisections=5)
    sigma = float(method.fit(state(theta, 0.0), some, generator(3)).sigma)  # type: ignore[arg-type]
    labels, noise = some.logits(theta)[0].argmax(-1), directions(theta, 6, "", generator(3))

    def kept(width: float) -> float:
        p = some.logits(moved(theta, noise, torch.full((6,), width))).softmax(-1).mean(0)
        return float((p.argmax(-1) == labels).double().mean())

    assert kept(sigma) >= 0.9 > kept(sigma * 4 ** (1 / 32))


def test_the_tolerance_does_not_depend_on_the_number_of_rows() -> None:
    theta = leaves()
    one, many = (TFB().fit(state(theta, 0.0), model(n), generator(1)) for n in (1, 50))  # type: ignore[arg-type]
    assert float(one.sigma) == float(many.sigma)


def test_the_search_is_short() -> None:
    some = model()
    TFB(samples=3).fit(state(leaves(), 0.0), some, generator(1))  # type: ignore[arg-type]
    assert some.asked[0] == 1
    assert set(some.asked[1:]) == {3}
    assert len(some.asked) <= 10


@pytest.mark.parametrize("limit", [1e-5, 0.0099, 0.01, 0.013, 0.5, 70.0])
def test_largest_is_feasible_and_close(limit: float) -> None:
    asked: list[float] = []
    found = largest(lambda s: bool(asked.append(s) is None and s <= limit), 6)
    assert found in asked
    assert found <= limit < found * 4 ** (1 / 64) * (1 + 1e-9)


def test_largest_without_an_answer() -> None:
    assert largest(lambda s: False, 3) == 0.0
    assert math.isfinite(largest(lambda s: True, 3))
    # where what is tolerated is no interval, the answer is still one that was tolerated
    found = largest(lambda s: int(math.log2(s)) % 2 == 0, 5)
    assert found == 0.0 or int(math.log2(found)) % 2 == 0


def test_leaves_without_a_partner_get_noise_of_their_own_size() -> None:
    theta = {"*/bank": 5 * torch.randn(2, 40, 30, generator=generator(1)), "head/bias": torch.ones(2, 3)}
    theta["*/bank"][1] *= 10
    drawn = TFB().sample(state(theta, 0.1), 2, generator(2))
    for k, size in ((0, 5.0), (1, 50.0)):
        noise = drawn["*/bank"][k] - theta["*/bank"][k]
        assert float(noise.std()) == pytest.approx(0.1 * size, rel=0.1)
    assert torch.equal(drawn["head/bias"], theta["head/bias"])
    other = leaves() | {"s/B": torch.ones(1, OUT, RANK + 1)}  # no product with A
    drawn = TFB().sample(state(other, 0.1), 1, generator(2))
    assert float((drawn["s/A"] - other["s/A"]).abs().max()) > 0
    only = TFB(over="*/B").sample(state(leaves(), 0.1), 1, generator(2))
    assert torch.equal(only["s/A"], leaves()["s/A"])
    assert not torch.equal(only["s/B"], leaves()["s/B"])


def test_members_have_widths_of_their_own() -> None:
    theta, some = leaves(2), model()
    fitted = TFB(Ensemble(Point(), members=2)).fit(state(theta, 0.0), some, generator(3))  # type: ignore[arg-type]
    assert float(fitted.sigma[0]) != float(fitted.sigma[1])
    alone = TFB().fit(state(tree.member(theta, 0), 0.0), some, generator(3))  # type: ignore[arg-type]
    assert float(alone.sigma) == float(fitted.sigma[0])


def test_which_rows_are_needed() -> None:
    assert not ask.needs_calibration(Ensemble(TFB()))
    assert ask.needs_calibration(TFB(SWA(), anchor="calibration"))
    assert ask.needs_calibration(Temperature(TFB()))


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"measure": "ece"}, "measure"),
        ({"labels": "mine"}, "labels"),
        ({"anchor": "test"}, "anchor"),
        ({"rows": 0}, "rows"),
        ({"samples": 0}, "samples"),
        ({"bisections": 0}, "bisections"),
        ({"tolerance": 0.0}, "tolerance"),
    ],
)
def test_settings(settings: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        TFB(**settings)
