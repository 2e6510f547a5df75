"""The compact file of sparse matrices: bytes by the formula, bits as they were."""

from __future__ import annotations

import pytest
import torch

from kilobayes import tree
from kilobayes.adapters import RoseLoRA, sparse
from kilobayes.random import generator
from kilobayes.types import Params, Site


def shapes(*widths: tuple[int, int], layers: int = 1) -> list[Site]:
    """Sites that exist in name alone, for sizes (d_in, d_out) in each of some layers."""
    return [
        Site(f"layer.{n}.{i}", a, b, weight=lambda a=a, b=b: torch.empty(b, a, device="meta"))
        for n in range(layers)
        for i, (a, b) in enumerate(widths)
    ]


def sparse_leaves(method: RoseLoRA, sites: list[Site], stack: int, keep: float) -> Params:
    """Leaves of which the share ``keep`` of every row of A and column of B is not zero."""
    theta = method.init(sites, {}, stack, generator(1))
    noise = {k: torch.randn(v.shape, generator=generator(2)) for k, v in theta.items()}
    dense = {k: torch.rand(v.shape, generator=generator(3)) + 0.1 for k, v in theta.items()}
    return RoseLoRA(r=method.r, keep=keep).restrict(dense, noise, None)


def llama(d: int, wide: int) -> list[tuple[int, int]]:
    return [(d, d)] * 4 + [(d, wide)] * 2 + [(wide, d)]


@pytest.mark.parametrize(
    ("sites", "by_formula", "nearly"),
    [
        (shapes((768, 768), (768, 768), layers=12), 24 * 8 * 2 * 39 * 6, 88_474),
        (shapes((1024, 1024), (1024, 1024), layers=24), 48 * 8 * 2 * 52 * 6, 235_930),
        (shapes(*llama(4096, 11008), layers=32), 32 * 8 * 6 * (8 * 205 + 3 * (205 + 551)), 5_996_544),
        (shapes(*llama(5120, 13824), layers=40), 40 * 8 * 6 * (8 * 256 + 3 * (256 + 692)), 9_388_032),
    ],
    ids=["RoBERTa-base", "RoBERTa-large", "Llama-2-7B", "Llama-2-13B"],
)
def test_bytes_of_known_models(sites: list[Site], by_formula: int, nearly: int) -> None:
    """6 rho r (m + n) without rounding up, from the paper's settings, is a little less."""
    found = RoseLoRA(r=8, keep=0.05).stored(sites)
    assert found == by_formula
    assert nearly < found < 1.03 * nearly


@pytest.mark.parametrize("stack", [1, 3])
def test_a_file_of_pruned_leaves(stack: int) -> None:
    method, sites = RoseLoRA(r=3, keep=0.1), shapes((41, 70), (70, 25), layers=2)
    theta = sparse_leaves(method, sites, stack, keep=0.1)
    theta["layer.0.0/A"][0, 1] = 0.0  # fewer than there is room for
    packed = method.pack(theta, sites)
    assert set(packed) == {"values", "positions"}
    assert packed["positions"].dtype == torch.uint16
    assert tree.total_bytes(packed.values()) == stack * method.stored(sites)
    back = method.unpack(packed, sites)
    assert not tree.first_difference(back, theta)


@pytest.mark.parametrize("keep", [0.3, 1.0])
def test_a_file_of_denser_leaves(keep: float) -> None:
    """Averages over weights from before the end of the schedule have more in a row, not equally many."""
    method, sites = RoseLoRA(r=3, keep=0.1), shapes((41, 70), (70, 25))
    theta = sparse_leaves(method, sites, 2, keep)
    theta["layer.0.1/B"][1, 5:, 1] = 0.0
    packed = method.pack(theta, sites)
    assert set(packed) == {"values", "positions", "rows"}
    assert not tree.first_difference(method.unpack(packed, sites), theta)


def test_wide_leaves() -> None:
    method, sites = RoseLoRA(r=2, keep=0.001), shapes((50, 2**16), (50, 2**16 + 1))
    theta = sparse_leaves(method, sites, 1, keep=0.001)
    theta["layer.0.0/B"][0, -1, 0] = 0.0
    theta["layer.0.1/B"][0, -1, 0] = 3.0
    theta["layer.0.1/B"][0, :-1, 0] = 0.0
    packed = method.pack(theta, sites)
    assert (packed["positions"].dtype, packed["wide"].dtype) == (torch.uint16, torch.int32)
    assert tree.total_bytes(packed.values()) == method.stored(sites) == 12 * (1 + 66 + 1) + 16 * 66
    assert not tree.first_difference(method.unpack(packed, sites), theta)


def test_bits() -> None:
    """Negative zeros, NaNs and infinities come back as they were."""
    odd = torch.tensor([[[0.0, -0.0, float("nan"), float("-inf"), 1e-45, 0.0]]])
    packed = sparse.pack([odd], [5])
    assert packed["values"].shape == (1, 5)
    (back,) = sparse.unpack(packed, [(1, 6)], [5])
    assert torch.equal(back.view(torch.int32), odd.view(torch.int32))


def test_values_of_other_precisions() -> None:
    method, sites = RoseLoRA(r=3, keep=0.1), shapes((41, 70))
    theta = sparse_leaves(method, sites, 1, keep=0.1)
    packed = method.pack(theta, sites)
    back = method.unpack(packed | {"values": packed["values"].half()}, sites)
    assert not tree.first_difference(back, {k: v.half() for k, v in theta.items()})


def test_a_file_of_other_shapes() -> None:
    method, sites = RoseLoRA(r=3, keep=0.1), shapes((40, 70))
    packed = method.pack(sparse_leaves(method, sites, 1, keep=0.1), sites)
    with pytest.raises(ValueError, match="there are 33 values for rows that have 24"):
        method.unpack(packed, shapes((40, 40)))
