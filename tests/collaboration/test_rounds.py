from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kilobayes import collaboration, gauge, host, tree
from kilobayes.adapters import LoRA, LoRAXS
from kilobayes.collaboration import rounds, updates
from kilobayes.collaboration.scheme import NEEDS, Scheme
from kilobayes.errors import KilobayesError
from kilobayes.random import generator
from kilobayes.testing.tiny import perturbed, tiny_model, tiny_start
from kilobayes.types import Params, delta

TRUST = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.0, 0.0, 1.0]], dtype=torch.float64)
NAN = float("nan")


def users(adapter: Any) -> tuple[Any, Params]:
    model = tiny_model(adapter)
    return model, perturbed(tiny_start(model, [1, 1, 1]), size=0.3)


def deltas(model: Any, theta: Params) -> torch.Tensor:
    built = host.build(model, theta)
    sites = host.sites(model)
    return torch.cat([delta(built[s.name], s.d_in).detach().flatten(1) for s in sites], dim=1)


def test_steps_of_exchange() -> None:
    assert rounds.exchanges(500, 100, 25) == list(range(100, 501, 25))  # the paper's seventeen
    assert rounds.exchanges(10, 4, 4) == [4, 8, 10]
    assert rounds.exchanges(6, 0, 3) == [3, 6]
    assert rounds.exchanges(5, 9, 3) == [5]
    with pytest.raises(KilobayesError, match="exchange"):
        rounds.exchanges(5, 1, 0)


def test_bad_updates_are_absent_and_say_why() -> None:
    good = {"a/R": torch.ones(1, 2, 2), "a/R~variance": torch.ones(1, 2, 2)}
    like = rounds.shapes(good)
    bad: dict[str, Params | None] = {
        "nan": good | {"a/R": torch.full((1, 2, 2), NAN)},
        "infinite": good | {"a/R": torch.full((1, 2, 2), float("inf"))},
        "shape": good | {"a/R": torch.ones(1, 3, 2)},
        "stack": good | {"a/R": torch.ones(2, 2, 2)},
        "less": {"a/R": good["a/R"]},
        "more": good | {"b/R": good["a/R"]},
        "whole": good | {"a/R": torch.ones(1, 2, 2, dtype=torch.int64)},
        "negative": good | {"a/R~variance": -good["a/R"]},
        "away": None,
    }
    found = rounds.accept({"one": good, **bad, "two": tree.map_params(lambda t: 3 * t, good)}, like)
    assert found.names == ["one", "two"]
    assert found.theta["a/R"][:, 0, 0].tolist() == [1.0, 3.0]
    assert set(found.refused) == set(bad)
    words = {"shape": "(1, 3, 2)", "less": "missing", "more": "not asked for", "nan": "no number",
             "away": "absent", "negative": "negative"}  # fmt: skip
    assert all(word in found.refused[name] for name, word in words.items())
    assert rounds.accept({"nan": bad["nan"]}, like).theta == {}


def test_absentees_keep_theirs() -> None:
    w = rounds.everyone(TRUST[:2, :2] / TRUST[:2, :2].sum(dim=1, keepdim=True), ["c", "a"], ["a", "b", "c"])
    np.testing.assert_allclose(w, [[5 / 7, 0, 2 / 7], [0, 1, 0], [1 / 3, 0, 2 / 3]])


def test_averages_do_not_depend_on_anyone_s_gauge() -> None:
    """One user's factors are turned and stretched, which changes none of its predictions."""
    model, theta = users(LoRA(r=4))
    turned = dict(theta)
    turn = torch.randn(4, 4, generator=generator(3)) + 2 * torch.eye(4)
    for key in [k for k in theta if k.endswith("/A")]:
        other = f"{key[:-2]}/B"
        turned[key], turned[other] = theta[key].clone(), theta[other].clone()
        turned[key][1], turned[other][1] = turn @ theta[key][1], theta[other][1] @ torch.linalg.inv(turn)
    first, second = (rounds.mix(model, t, TRUST) for t in (theta, turned))
    one, other_ = deltas(model, first.theta), deltas(model, second.theta)
    assert first.how == second.how == "updates"
    torch.testing.assert_close(one, other_, rtol=0, atol=1e-4 * float(one.abs().max()))
    plain = [deltas(model, rounds.mix(model, t, TRUST, "leaves").theta) for t in (theta, turned)]
    assert float((plain[0] - plain[1]).norm()) > 0.1 * float(plain[0].norm())  # the published average does
    key = next(k for k in theta if k.endswith("/A"))
    torch.testing.assert_close(second.theta[key][2], turned[key][2])  # who trusts nobody keeps its factors


def test_mixed_factors_stay_near_one_s_own() -> None:
    """An optimiser's moments go on to mean something."""
    model = tiny_model(LoRA(r=4))
    theta = perturbed(tiny_start(model, [1, 1, 1]), size=0.02)
    mixed, exact = rounds.mix(model, theta, TRUST), updates.average(model, theta, TRUST, how="updates")
    torch.testing.assert_close(deltas(model, mixed.theta), deltas(model, exact.theta), rtol=0, atol=1e-5)
    for key in [k for k in theta if k.endswith("/A")]:
        near = float((mixed.theta[key] - theta[key]).norm() / theta[key].norm())
        assert near < 0.3
        assert float((exact.theta[key] - theta[key]).norm() / theta[key].norm()) > 3 * near


def test_no_direction_dies_where_the_average_has_a_lower_rank() -> None:
    gen = generator(8)
    a, b = torch.randn(1, 4, 20, generator=gen), torch.zeros(1, 12, 4)
    b[:, :, :2] = torch.randn(1, 12, 2, generator=gen)
    cut = gauge.truncate(a, b, 4)
    found_a, found_b = gauge.towards(cut.A, cut.B, a)
    torch.testing.assert_close(found_b @ found_a, b @ a, rtol=1e-4, atol=1e-5)
    assert float(torch.linalg.svdvals(found_a[0])[-1]) > 0.5
    zero_a, zero_b = gauge.towards(torch.zeros_like(a), torch.zeros_like(b), a)
    torch.testing.assert_close(zero_a, a)
    assert not zero_b.any()


def test_moments_are_those_of_the_mixture() -> None:
    """Against numpy's mean and variance of draws in proportion to trust."""
    model, theta = users(LoRAXS(r=2))
    gen = generator(5)
    key = next(k for k in theta if k.endswith("/R"))
    sent = dict(theta)
    for k, v in theta.items():
        sent[f"{k}~mean"] = v + 0.1
        sent[f"{k}~variance"] = torch.rand(v.shape, generator=gen)
    mixed = rounds.mix(model, sent, TRUST).theta
    draw = np.random.default_rng(0)
    mean, deviation = sent[f"{key}~mean"].double().numpy(), sent[f"{key}~variance"].double().sqrt().numpy()
    who = draw.choice(3, size=200_000, p=TRUST[0].numpy())
    draws = mean[who, 0, 0] + deviation[who, 0, 0] * draw.standard_normal(len(who))
    assert float(mixed[f"{key}~mean"][0, 0, 0]) == pytest.approx(draws.mean(), abs=0.01)
    assert float(mixed[f"{key}~variance"][0, 0, 0]) == pytest.approx(draws.var(), rel=0.02)
    torch.testing.assert_close(mixed[f"{key}~variance"][2], sent[f"{key}~variance"][2])
    model, theta = users(LoRA(r=2))
    more = {f"{k}{end}": v.abs() for k, v in theta.items() for end in ("~mean", "~variance")}
    with pytest.raises(KilobayesError, match="have no average"):
        rounds.mix(model, theta | more, TRUST)
    assert rounds.mix(model, theta | more, TRUST, "leaves").how == "leaves"


def test_draws_of_moments() -> None:
    update = {"a/R": torch.zeros(2, 3), "a/R~mean": torch.tensor([[1.0] * 3, [5.0] * 3]),
              "a/R~variance": torch.tensor([[0.0] * 3, [4.0] * 3])}  # fmt: skip
    found = rounds.drawn(update, 20_000, generator(1))["a/R"].unflatten(0, (2, -1))
    assert (found[0] == 1).all()
    assert float(found[1].mean()) == pytest.approx(5.0, abs=0.05)
    assert float(found[1].var()) == pytest.approx(4.0, rel=0.05)
    assert torch.equal(rounds.drawn(update, 1, generator(1))["a/R"], update["a/R"])


@pytest.mark.parametrize("name", list(NEEDS))
def test_every_scheme_is_fedavg_where_users_are_alike(name: str) -> None:
    logs = torch.randn(1, 7, 3, generator=generator(2)).log_softmax(-1).repeat(4, 1, 1)
    same = {"predictions": logs, "losses": torch.full((4, 4), 0.7), "gram": torch.full((4, 4), 2.0),
            "kinds": torch.zeros(4, dtype=torch.int64)}  # fmt: skip
    scheme = Scheme(name)
    w = scheme.trust(same.get(scheme.needs), [1, 2, 3, 4])
    np.testing.assert_allclose(w.sum(dim=1), 1.0)
    expected = collaboration.local(4) if name == "local" else collaboration.fedavg([1, 2, 3, 4])
    np.testing.assert_allclose(w, expected, atol=1e-9)


def test_a_scheme_without_its_evidence_or_with_a_typo() -> None:
    with pytest.raises(KilobayesError, match="needs losses"):
        Scheme("validation").trust(None, [1, 2])
    with pytest.raises(KilobayesError, match="did you mean predictions"):
        Scheme("prediction")
    with pytest.raises(KilobayesError, match="above 0"):
        Scheme("weights", temperature=0.0)


def test_bytes_of_a_round() -> None:
    update = {"a/R": torch.zeros(1, 5, 5)}
    assert rounds.bytes_of(update) == 100
    assert rounds.traffic("", 100, 4) == (100, 100)
    assert rounds.traffic("predictions", 100, 4, 64) == (164, 100)
    assert rounds.traffic("losses", 100, 4) == (132, 400)
