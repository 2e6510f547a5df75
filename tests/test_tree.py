from __future__ import annotations

import pytest
import torch

from kilobayes import tree
from kilobayes.posteriors import SWAG, Ensemble, Point, Temperature
from kilobayes.posteriors.point import PointState
from kilobayes.posteriors.temperature import TemperatureState
from kilobayes.random import generator
from kilobayes.types import Params


@pytest.fixture
def theta() -> Params:
    gen = generator(1)
    return {"x.y/A": torch.randn(3, 2, 4, generator=gen), "*/bank": torch.randn(3, 5, generator=gen)}


def test_keys() -> None:
    assert tree.split_key("bert.layer.0/A") == ("bert.layer.0", "A")
    found = tree.leaves_of({k: torch.zeros(1) for k in ("a/A", "ab/A", "a/B", "*/bank")}, "a")
    assert sorted(found) == ["A", "B", "bank"]
    leaves = {k: torch.zeros(1) for k in ("b/A", "a/A", "a/B", "h/weight", "a/A~scale")}
    assert tree.chosen(leaves, "*/A") == tree.chosen(leaves, "") == ["a/A", "b/A"]
    assert tree.chosen({k: v for k, v in leaves.items() if "/A" not in k}, "") == ["a/B"]
    assert tree.chosen({"h/weight": torch.zeros(1)}, "") == ["h/weight"]
    with pytest.raises(ValueError, match="leaves are called A, B, weight"):
        tree.chosen(leaves, "*/bank")


def test_members(theta: Params) -> None:
    assert tree.size(theta) == 3
    assert tree.numbers(theta) == 13
    assert torch.equal(tree.member(theta, 1)["x.y/A"], theta["x.y/A"][1:2])
    assert torch.equal(tree.member(theta, -1)["*/bank"], theta["*/bank"][2:])
    assert torch.equal(tree.member(theta, torch.tensor([2, 0, 2]))["*/bank"], theta["*/bank"][[2, 0, 2]])
    assert not tree.first_difference(tree.concatenate([tree.member(theta, i) for i in range(3)]), theta)


def test_flat_and_back(theta: Params) -> None:
    rows = tree.flat(theta)
    assert rows.shape == (3, 13)
    assert torch.equal(rows[1], torch.cat([theta["x.y/A"][1].flatten(), theta["*/bank"][1]]))
    assert not tree.first_difference(tree.unflat(rows, theta), theta)
    assert tree.unflat(rows[:1].repeat(7, 1), theta)["x.y/A"].shape == (7, 2, 4)


def test_clone_shares_no_memory(theta: Params) -> None:
    copy = tree.clone(theta)
    theta["*/bank"].zero_()
    assert tree.first_difference(copy, theta) == "*/bank"


@pytest.mark.parametrize(("k", "n"), [(1, 4), (3, 3), (3, 7), (5, 2), (4, 12), (2, 0)])
def test_spread_is_even_and_in_order(k: int, n: int) -> None:
    who = tree.spread(k, n)
    counts = torch.bincount(who, minlength=k)
    assert len(who) == n
    assert torch.equal(who, who.sort().values)
    assert int(who.max()) < k if n else True
    assert int(counts.max() - counts.min()) <= 1


def test_first_difference_sees_keys_shapes_and_values(theta: Params) -> None:
    assert tree.first_difference(theta, tree.clone(theta)) == ""
    assert tree.first_difference(theta, {"*/bank": theta["*/bank"]}) == "x.y/A"
    assert tree.first_difference(theta, theta | {"*/bank": theta["*/bank"][:1]}) == "*/bank"
    other = tree.clone(theta)
    other["x.y/A"][0, 0, 0] = torch.nextafter(other["x.y/A"][0, 0, 0], torch.tensor(9.0))
    assert tree.first_difference(theta, other) == "x.y/A"


def test_names_of_a_nested_state(theta: Params) -> None:
    posterior = Ensemble(Temperature(Temperature(SWAG(rank=2))), members=3)
    state = posterior.init(theta, generator(1))
    names = tree.flatten_state(state)
    assert "inner|inner|average|x.y/A" in names
    assert "inner|temperature" in names
    back = tree.unflatten_state(posterior, names)
    assert isinstance(back, TemperatureState)
    assert not tree.first_difference(tree.flatten_state(back), names)


def test_a_missing_tensor_is_named(theta: Params) -> None:
    posterior = Temperature(Point(2.0))
    names = tree.flatten_state(posterior.init(theta, generator(1)))
    del names["temperature"]
    with pytest.raises(KeyError, match="temperature"):
        tree.unflatten_state(posterior, names)


def test_map_state_keeps_the_type_and_the_original(theta: Params) -> None:
    state = Point(1.0).init(theta, generator(1))
    doubled = tree.map_state(torch.Tensor.double, state)
    assert isinstance(doubled, PointState)
    assert doubled.center["*/bank"].dtype == torch.float64
    assert state.theta["*/bank"].dtype == torch.float32


def test_total_bytes() -> None:
    assert tree.total_bytes([torch.zeros(3, 2), torch.zeros(5, dtype=torch.float64)]) == 24 + 40
