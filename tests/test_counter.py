from __future__ import annotations

import pytest
import torch

from kilobayes import counter

MASK = (1 << 64) - 1


def reference_mix(z: int) -> int:
    """The finaliser in Python's integers."""
    z &= MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def reference(key: int, index: int) -> float:
    return (reference_mix(reference_mix(key) + (index + 1) * 0x9E3779B97F4A7C15) >> 40) / 2**24


def test_the_finaliser_gives_the_published_sequence() -> None:
    # the test vector of SplitMix64 for the seed 1234567
    states = torch.tensor([counter.signed(1234567 + n * counter.GOLDEN) for n in (1, 2, 3)])
    found = [value & MASK for value in counter.mix(states).tolist()]
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_known_values() -> None:
    # frozen: files hold seeds instead of numbers, so these may never change
    assert (counter.uniform(0, 0, 4) * 2**24).tolist() == [14819496, 7239838, 443485, 16288696]
    assert (counter.uniform(-1, 0, 2) * 2**24).tolist() == [10844024, 11830564]
    assert (counter.uniform(7, 10**12, 2) * 2**24).tolist() == [16264264, 2097145]
    assert counter.key(1, 2) == 627405149472732428
    assert counter.key(2, 1) == -2896775031061218760


@pytest.mark.parametrize("key", [0, 1, -1, 2**63, 2**64 + 5, -(2**70)])
def test_equal_to_python_integers(key: int) -> None:
    start = 2**40 + 3
    expected = [reference(key, start + n) for n in range(5)]
    assert counter.uniform(key, start, 5).tolist() == expected


def test_any_chunking_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = counter.uniform(5, 100, 1000)
    assert torch.equal(torch.cat([counter.uniform(5, 100, 1), counter.uniform(5, 101, 999)]), whole)
    monkeypatch.setattr(counter, "CACHED", 7)
    assert torch.equal(counter.uniform(5, 100, 1000), whole)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(counter.uniforms(order + 100, torch.tensor(5)), whole[order])
    assert counter.uniform(5, 100, 0).shape == (0,)


def test_keys_and_indices_broadcast() -> None:
    keys = torch.tensor([[3], [-4], [2**62]])
    table = counter.uniforms(torch.arange(6), keys)
    assert table.shape == (3, 6)
    assert table.dtype == torch.float32
    for row, key in zip(table, keys[:, 0].tolist(), strict=True):
        assert torch.equal(row, counter.uniform(key, 0, 6))


def test_moments_and_cells_are_uniform() -> None:
    count = 400_000
    u = counter.uniform(9, 0, count).double()
    assert float(u.min()) >= 0.0
    assert float(u.max()) < 1.0
    for power in (1, 2, 3, 4):  # E u^p = 1/(p+1), Var u^p = 1/(2p+1) - 1/(p+1)^2
        error = (1 / (2 * power + 1) - 1 / (power + 1) ** 2) ** 0.5 / count**0.5
        assert abs(float((u**power).mean()) - 1 / (power + 1)) < 5 * error
    cells = torch.bincount((u * 1000).long(), minlength=1000).double()
    chi = float(((cells - count / 1000) ** 2 / (count / 1000)).sum())
    assert abs(chi - 999) < 5 * (2 * 999) ** 0.5


@pytest.mark.parametrize("lag", [1, 2, 3, 64, 1000])
def test_a_stream_does_not_correlate_with_itself(lag: int) -> None:
    count = 200_000
    u = counter.uniform(1, 0, count + lag).double() - 0.5
    assert abs(float((u[:count] * u[lag:]).mean()) * 12) < 5 / count**0.5


def test_neighbouring_streams_do_not_correlate_or_overlap() -> None:
    keys = torch.cat([torch.arange(40), torch.tensor([2**k for k in range(20, 63)])])
    u = counter.uniforms(torch.arange(20_000), keys[:, None]).double() - 0.5
    correlation = (u @ u.T) * 12 / 20_000
    off = correlation - torch.diag(correlation.diagonal())
    assert float(off.abs().max()) < 6 / 20_000**0.5
    # a key one increment further on is not the same stream, shifted
    shifted = counter.uniform(counter.GOLDEN, 0, 1000)
    assert int(torch.isin(shifted, counter.uniform(0, 0, 1001)).sum()) <= 2


def test_bits_are_even_and_flip_with_any_bit_of_the_input() -> None:
    u = (counter.uniform(3, 0, 50_000) * 2**24).long()
    bits = (u[:, None] >> torch.arange(24)) & 1
    assert ((bits.double().mean(0) - 0.5).abs() < 5 * 0.5 / 50_000**0.5).all()
    keys = torch.arange(5000)
    base = (counter.uniforms(torch.tensor(11), keys) * 2**24).long()
    for bit in (0, 1, 17, 40, 63):
        other = (counter.uniforms(torch.tensor(11), keys ^ counter.signed(1 << bit)) * 2**24).long()
        flipped = (((base ^ other)[:, None] >> torch.arange(24)) & 1).double().mean(0)
        assert ((flipped - 0.5).abs() < 6 * 0.5 / 5000**0.5).all()


def test_keys_of_several_integers_differ() -> None:
    parts = (
        [(a, b) for a in range(30) for b in range(30)] + [(a,) for a in range(30)] + [(0, 0, 0), (-1, 2**80)]
    )
    assert len({counter.key(*part) for part in parts}) == len(parts)


def test_global_generator_is_untouched() -> None:
    before = torch.random.get_rng_state()
    counter.uniform(1, 0, 10)
    counter.uniforms(torch.arange(4), torch.tensor(1))
    counter.key(1, 2)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_an_accelerator_gives_the_same_bits() -> None:
    assert torch.equal(counter.uniform(5, 2**40, 100_000, "cuda").cpu(), counter.uniform(5, 2**40, 100_000))
