"""Packed products and the fused low-rank update against plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kilobayes.host import kernels
from kilobayes.host.kernels import FrozenWeight, linear, low_rank_linear, pack

pytestmark = pytest.mark.skipif(not kernels.available(), reason="this torch has no packed products")


@pytest.fixture(autouse=True)
def packed_at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SMALLEST", 0)


@pytest.fixture
def gen() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Relative to the largest entry: sums in another order lose digits where they cancel."""
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    assert (got - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 64, 1000, 4096])
@pytest.mark.parametrize("inputs_first", [False, True])
def test_one_layout_serves_every_number_of_rows(rows: int, inputs_first: bool, gen: torch.Generator) -> None:
    weight, bias = torch.randn(24, 40, generator=gen), torch.randn(24, generator=gen)
    record = pack(weight.mT if inputs_first else weight, bias, inputs_first=inputs_first)
    x = torch.randn(rows, 40, generator=gen)
    exact = (x.double() @ weight.double().T + bias.double()).float()
    close(record.multiply(x), exact, 2e-6)
    close(record.mT.multiply(exact), (exact.double() @ weight.double()).float(), 2e-6)
    close(record.multiply(x.T.contiguous().T), exact, 2e-6)


def test_second_derivatives(gen: torch.Generator) -> None:
    record = pack(torch.randn(6, 5, generator=gen))
    x = torch.randn(4, 5, generator=gen).requires_grad_()

    def grad_norm(y: torch.Tensor) -> torch.Tensor:
        (g,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(g.pow(2).sum(), x)[0]

    close(grad_norm(linear(x, record)), grad_norm(x @ record.source.T))


@pytest.mark.parametrize("stack", [1, 3])
@pytest.mark.parametrize("shape", [(6, 40), (6, 5, 40), (3, 2, 5, 40)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("needs", ["xab", "ab", "x", "b"])
@pytest.mark.parametrize("kind", ["packed", "frozen"])
def test_the_fused_update_matches_autograd(
    stack: int, shape: tuple[int, ...], bias: bool, needs: str, kind: str, gen: torch.Generator
) -> None:
    weight, shift = torch.randn(24, 40, generator=gen), torch.randn(24, generator=gen) if bias else None
    record = pack(weight, shift) if kind == "packed" else FrozenWeight(weight, shift)
    tensors = {
        "x": torch.randn(shape, generator=gen),
        "a": torch.randn(stack, 4, 40, generator=gen),
        "b": torch.randn(stack, 24, 4, generator=gen),
    }
    wanted_of = [tensors[k].requires_grad_() for k in needs]
    x, a, b = tensors.values()

    def plain(x: torch.Tensor) -> torch.Tensor:
        out = []
        for s, part in enumerate(x.chunk(stack)):
            y = part @ record.values.T + (part @ a[s].T) @ b[s].T
            out.append(y if record.bias is None else y + record.bias)
        return torch.cat(out)

    def all_of(y: torch.Tensor) -> list[torch.Tensor]:
        return [y.detach(), *torch.autograd.grad((y * y.detach().cos()).sum(), wanted_of)]

    reference = all_of(plain(x))
    runs = [
        low_rank_linear(x, record, a, b),
        checkpoint(low_rank_linear, x, record, a, b, use_reentrant=False),
        low_rank_linear(x.mT.contiguous().mT, record, a, b),
    ]
    for run in runs:
        for got, wanted in zip(all_of(run), reference, strict=True):
            close(got, wanted)


def test_the_fused_update_differentiates_twice(gen: torch.Generator) -> None:
    shapes = ((6, 2, 5), (3, 2, 5), (3, 4, 2))
    tensors = [torch.randn(s, generator=gen, dtype=torch.float64).requires_grad_() for s in shapes]
    weight, bias = (torch.randn(s, generator=gen, dtype=torch.float64) for s in ((4, 5), (4,)))

    def update(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return low_rank_linear(x, FrozenWeight(weight, bias), a, b)

    assert torch.autograd.gradcheck(update, tensors)
    assert torch.autograd.gradgradcheck(update, tensors)


def test_the_fused_update_without_a_transpose_takes_the_plain_products(gen: torch.Generator) -> None:
    record = pack(torch.randn(8, 8, generator=gen), backward=False, inputs_first=True)
    x = torch.randn(4, 8, generator=gen).requires_grad_()
    a, b = torch.randn(2, 3, 8, generator=gen), torch.randn(2, 8, 3, generator=gen)
    y = low_rank_linear(x, record, a, b)
    wanted = torch.cat([x[2 * s : 2 * s + 2] @ (record.source + (b[s] @ a[s]).T) for s in range(2)])
    close(y, wanted)
    close(*(torch.autograd.grad(out.sin().sum(), x)[0] for out in (y, wanted)))


def test_missing_or_wrong_operators_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply = kernels.PackedWeight.multiply

    def missing(weight: torch.Tensor) -> torch.Tensor:
        raise AttributeError("no such operator")

    for name, owner, broken in (
        ("multiply", kernels.PackedWeight, lambda self, x: multiply(self, x) * 1.01),
        ("_reorder", kernels, missing),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken)
            assert not kernels.available.__wrapped__()
    assert kernels.available.__wrapped__()


@pytest.mark.parametrize("stack", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_large_ranks_are_added_to_the_weight(stack, bias, frozen):
    """The same numbers and gradients as two thin products, whichever takes fewer multiplications."""
    gen = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 10, generator=gen)
    base = kernels.FrozenWeight(weight, torch.randn(12, generator=gen) if bias else None)
    x = torch.randn(stack * 8, 4, 10, generator=gen).requires_grad_()
    a = torch.randn(stack, 9, 10, generator=gen).requires_grad_(not frozen)
    b = torch.randn(stack, 12, 9, generator=gen).requires_grad_()
    assert kernels.dense_pays(x, base, a, b)
    assert not kernels.dense_pays(x, base, a[:, :1], b[:, :, :1])
    assert not kernels.dense_pays(x.bfloat16(), base, a, b)
    found = kernels.low_rank_linear(x, base, a, b)
    update = (x.view(stack, -1, 10) @ a.mT @ b.mT).view(*x.shape[:-1], 12)
    expected = torch.nn.functional.linear(x, weight, base.bias) + update
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    wanted = [t for t in (x, a, b) if t.requires_grad]
    ours = torch.autograd.grad(found.sin().sum(), wanted)
    theirs = torch.autograd.grad(expected.sin().sum(), wanted)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
