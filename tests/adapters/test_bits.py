from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from kilobayes.adapters import bits
from kilobayes.random import Streams, generator

CLIP = torch.tensor([0.7, 0.05])


def open_to(width: int, stack: int = 2) -> Tensor:
    """Gates that are open up to a width."""
    return (torch.tensor(bits.WIDTHS[1:]) <= width).float().expand(stack, -1)


def numbers(beyond: float = 1.3) -> Tensor:
    """Uniform numbers ``(2, 40, 50)``, some outside the ranges."""
    uniform = torch.rand(2, 40, 50, generator=generator(1))
    return (2.0 * uniform - 1.0) * beyond * CLIP[:, None, None]


@pytest.mark.parametrize("width", bits.WIDTHS)
def test_the_error_is_at_most_half_a_step(width: int) -> None:
    x = numbers(1.0)
    step = 2.0 * CLIP / (2.0**width - 1.0)
    error = (bits.quantise(x, CLIP, open_to(width)) - x).abs().amax(dim=(1, 2))
    assert (error <= 0.5 * step * 1.001 + 1e-7 * CLIP).all()
    if width < 32:
        assert (error > 0.45 * step).all()  # and not by being finer than the width allows


@pytest.mark.parametrize("width", [2, 4, 8, 16])
def test_nested_rounding_is_rounding_to_the_finest_grid(width: int) -> None:
    x = numbers().numpy().astype(np.float64)
    clip = CLIP.numpy().astype(np.float64)[:, None, None]
    step, most = 2.0 * clip / (2.0**width - 1.0), 2 ** (width - 1) - 1
    exact = np.clip(x, -clip, clip) / step
    codes = np.clip(np.round(exact), -most, most)
    sure = np.abs(np.abs(exact - np.floor(exact)) - 0.5) > 0.02  # float32 may decide a tie otherwise
    sure |= np.abs(exact) > most
    found = bits.quantise(numbers(), CLIP, open_to(width)).numpy()
    assert sure.mean() > 0.9
    assert np.abs((found - codes * step) / step)[sure].max() < 0.01
    assert (bits.codes(numbers(), CLIP, width).numpy() == codes)[sure].all()


def test_wider_grids_hold_the_narrower_ones() -> None:
    for narrow, wide in zip(bits.WIDTHS, bits.WIDTHS[1:], strict=False):
        assert (2**wide - 1) % (2**narrow - 1) == 0
        on_grid = bits.quantise(numbers(), CLIP, open_to(narrow))
        assert torch.allclose(bits.quantise(on_grid, CLIP, open_to(wide)), on_grid, rtol=0, atol=1e-7)


def test_32_bits_are_float32_within_the_range() -> None:
    x = numbers()
    clip = CLIP[:, None, None]
    assert torch.allclose(bits.quantise(x, CLIP, open_to(32)), x.clamp(-clip, clip), rtol=0, atol=1e-8)


def test_a_closed_gate_closes_the_wider_ones() -> None:
    gates = torch.tensor([[0.0, 1.0, 0.3, 1.0]]).expand(2, -1)
    assert torch.equal(bits.quantise(numbers(), CLIP, gates), bits.quantise(numbers(), CLIP, open_to(2)))


def test_a_half_open_gate_adds_half_of_the_residual() -> None:
    narrow, wide = (bits.quantise(numbers(), CLIP, open_to(w)) for w in (4, 8))
    gates = torch.tensor([[1.0, 0.5, 0.0, 1.0]]).expand(2, -1)
    assert torch.allclose(bits.quantise(numbers(), CLIP, gates), (narrow + wide) / 2, atol=1e-7)


@pytest.mark.parametrize("width", bits.WIDTHS)
def test_gradients_are_straight_through(width: int) -> None:
    x = numbers().double().requires_grad_()
    clip = CLIP.double().requires_grad_()
    gates = open_to(width).double().requires_grad_()
    weigh = torch.randn(x.shape, generator=generator(2), dtype=torch.float64)
    found = bits.quantise(x, clip, gates)
    (found * weigh).sum().backward()
    edge = clip.detach()[:, None, None]
    inside = x.detach().abs() < edge
    assert x.grad is not None
    assert clip.grad is not None
    assert gates.grad is not None
    assert torch.allclose(x.grad, weigh * inside, atol=1e-12)
    held = x.detach().clamp(-edge, edge)
    by_clip = torch.where(inside, (found.detach() - held) / edge, found.detach() / edge)
    assert torch.allclose(clip.grad, (weigh * by_clip).sum(dim=(1, 2)), rtol=1e-9)
    level = bits.WIDTHS.index(width)
    assert gates.grad[:, :level].abs().min() > 0 if level else True
    assert not gates.grad[:, level + 1 :].any()


@pytest.mark.parametrize("logit", [-3.0, -0.935, 0.0, 1.2, 4.0])
def test_the_probability_that_a_gate_is_open(logit: float) -> None:
    count = 200_000
    drawn = bits.drawn(torch.full((1, count), logit), Streams([generator(5)])).double()
    assert drawn.min() >= 0.0
    assert drawn.max() <= 1.0
    shift = 2.0 / 3.0 * math.log(11.0)
    for found, exact in (
        ((drawn > 0).double().mean(), 1.0 / (1.0 + math.exp(-logit - shift))),
        ((drawn == 1).double().mean(), 1.0 / (1.0 + math.exp(-logit + shift))),
    ):
        assert abs(float(found) - exact) < 5.0 * math.sqrt(exact * (1.0 - exact) / count)
    assert float(bits.probability(torch.tensor(logit))) == pytest.approx(
        1.0 / (1.0 + math.exp(-logit - shift))
    )


def test_the_published_probability_at_zero() -> None:
    assert float(bits.probability(torch.tensor(0.0))) == pytest.approx(0.8318, abs=5e-5)


def test_drawn_gates_are_the_hard_concrete_of_their_uniform_numbers() -> None:
    logits = torch.linspace(-4.0, 4.0, 90).view(2, 5, 9).requires_grad_()
    found = bits.drawn(logits, Streams([generator(6), generator(7)]))
    normal = Streams([generator(6), generator(7)]).normal(logits.detach()).double()
    u = (1.0 + torch.erf(normal / math.sqrt(2.0))) / 2.0
    stretched = torch.sigmoid((torch.logit(u) + logits.double()) * 1.5) * 1.2 - 0.1
    assert torch.allclose(found.double(), stretched.clamp(0.0, 1.0), atol=1e-5)
    found.sum().backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad > 0, (stretched > 0) & (stretched < 1))


def test_gates_are_decided_where_published() -> None:
    logits = torch.tensor([-9.0, -0.936, -0.934, 6.0]).requires_grad_()
    found = bits.decided(logits)
    assert found.tolist() == [0.0, 0.0, 1.0, 1.0]
    found.sum().backward()
    p = bits.probability(logits.detach())
    assert logits.grad is not None
    assert torch.allclose(logits.grad, p * (1 - p))


@pytest.mark.parametrize("width", [2, 4, 8, 16])
def test_every_integer_comes_back(width: int) -> None:
    most = 2 ** (width - 1) - 1
    code = torch.arange(-most, most + 1).view(1, 1, -1)
    for c in (0.31, 1e-4, 77.0):
        clip = torch.tensor([c])
        value = bits.values(code, clip, width)
        assert torch.equal(bits.codes(value, clip, width), code)
        assert torch.equal(bits.quantise(value, clip, open_to(width, 1)), value)
        assert torch.allclose(value.double(), code.double() * (2.0 * c / (2.0**width - 1.0)), rtol=1e-6)


@pytest.mark.parametrize("width", [2, 4, 8, 16])
def test_integers_stand_for_what_is_quantised_to_them(width: int) -> None:
    x = numbers()
    value = bits.values(bits.codes(x, CLIP, width), CLIP, width)
    assert torch.equal(value, bits.quantise(x, CLIP, open_to(width)))


@pytest.mark.parametrize("width", bits.WIDTHS)
@pytest.mark.parametrize("count", [1, 3, 4, 7, 64])
def test_bytes(width: int, count: int) -> None:
    most = 2 ** (width - 1) - 1
    if width == 32:
        code = torch.randn(count, generator=generator(8))
    else:
        code = torch.randint(-most, most + 1, (count,), generator=generator(8))
    packed = bits.to_bytes(code, width)
    assert packed.dtype == torch.uint8
    assert len(packed) == bits.size_in_bytes(count, width) == math.ceil(count * width / 8)
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), packed])[1:]  # not at a word's boundary
    assert torch.equal(bits.from_bytes(shifted, width, count), code)
