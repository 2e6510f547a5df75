"""MoRA against matrices written out entry by entry, and the paper's counts and ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kilobayes import host, parametrise, tree
from kilobayes.adapters import MoRA
from kilobayes.adapters.mora import Square
from kilobayes.random import generator
from kilobayes.testing.tiny import perturbed, tiny_model, tiny_start
from kilobayes.types import Site, delta


def site(d_in: int, d_out: int, name: str = "a") -> Site:
    return Site(name, d_in, d_out, lambda: torch.empty(d_out, d_in, device="meta"))


def built(method: MoRA, at: Site, stack: int = 1, dtype: torch.dtype = torch.float64) -> Square:
    side = method.side(at)
    return method.build({"M": torch.randn(stack, side, side, generator=generator(5)).to(dtype)}, {}, at)


def written_out(matrix: np.ndarray, d_in: int, d_out: int, kind: str) -> np.ndarray:
    """The update of one member by loops over the blocks of the input and the rows of the output."""
    side = len(matrix)
    blocks, outputs = math.ceil(d_in / side), math.ceil(d_out / side)
    if kind == "share":
        outputs = 1
    update = np.zeros((d_out, d_in))
    for block in range(blocks):
        turned = np.zeros((side, side))
        for j in range(side):
            angle = block * 10000.0 ** (-2 * (j % (side // 2)) / side) if kind == "rotate" else 0.0
            turned[j, j] = math.cos(angle)
            if kind == "rotate":
                other = (j + side // 2) % side
                turned[j, other] = -math.sin(angle) if j < side // 2 else math.sin(angle)
        part = matrix @ turned
        for o in range(d_out):
            at, row = divmod(o % (min(blocks, outputs) * side), side)
            if at == block % outputs:
                for column in range(side):
                    update[o, (block * side + column) % d_in] += part[row, column]
    return update


# equal, wider out, wider in, one block, whole blocks, more inputs than two rounds of outputs, r beyond a side
SHAPES = [(24, 24), (20, 33), (33, 20), (5, 7), (16, 48), (100, 7), (7, 100), (90, 20), (9, 2)]


@pytest.mark.parametrize("kind", ["share", "rotate"])
@pytest.mark.parametrize(("d_in", "d_out"), SHAPES)
@pytest.mark.parametrize("r", [1, 3, 12])
def test_the_update_is_the_matrix_written_out(kind: str, d_in: int, d_out: int, r: int) -> None:
    at = site(d_in, d_out)
    operator = built(MoRA(r=r, kind=kind), at, stack=2)
    found = delta(operator, d_in)
    for member in range(2):
        wanted = written_out(operator.M[member].numpy(), d_in, d_out, kind)
        np.testing.assert_allclose(found[member].numpy(), wanted, rtol=0, atol=1e-12)
    x = torch.randn(2, 5, d_in, generator=generator(6), dtype=torch.float64)
    torch.testing.assert_close(operator(x), x @ found.mT)


@pytest.mark.parametrize(("d_in", "d_out"), [(24, 24), (20, 33), (33, 20), (90, 20), (20, 90)])
@pytest.mark.parametrize("r", [1, 2, 4])
def test_ranks(d_in: int, d_out: int, r: int) -> None:
    at = site(d_in, d_out)
    share, rotate = MoRA(r=r, kind="share"), MoRA(r=r)
    assert torch.linalg.matrix_rank(delta(built(share, at), d_in)).item() == share.side(at) > r
    assert torch.linalg.matrix_rank(delta(built(rotate, at), d_in)).item() == min(d_in, d_out)


def test_share_repeats_the_matrix_where_blocks_are_whole() -> None:
    operator = built(MoRA(r=4, kind="share"), site(24, 40))
    assert operator.M.shape[-1] == 16
    found = delta(operator, 24)[0]
    assert all(found[o, i] == operator.M[0, o % 16, i] for o in range(40) for i in range(8, 16))


def test_no_input_of_llamas_down_projection_is_dead() -> None:
    """The published code drops the blocks beyond those of the output: 11008 - 12 x 348 = 6832 inputs."""
    at = site(11008, 4096)
    operator = built(MoRA(), at, dtype=torch.float32)
    side = operator.M.shape[-1]
    assert 11008 - math.ceil(4096 / side) * side == 6832
    x = torch.zeros(1, 1, 11008, requires_grad=True)
    (operator(x) * torch.randn(4096, generator=generator(7))).sum().backward()
    assert x.grad is not None
    assert int((x.grad == 0).sum()) == 0


@pytest.mark.parametrize("kind", ["share", "rotate"])
@pytest.mark.parametrize(("d_in", "d_out"), [(7, 4), (4, 7)])
def test_gradients(kind: str, d_in: int, d_out: int) -> None:
    at, method = site(d_in, d_out), MoRA(r=1, kind=kind)

    def run(matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return method.build({"M": matrix}, {}, at)(x)

    side = method.side(at)
    matrix = torch.randn(2, side, side, generator=generator(1), dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, d_in, generator=generator(2), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (matrix, x))


def model_sites(layers: int, shapes: list[tuple[int, int]]) -> list[Site]:
    return [site(d_in, d_out, f"{i}.{j}") for i in range(layers) for j, (d_in, d_out) in enumerate(shapes)]


BASE, LARGE = model_sites(12, [(768, 768)] * 2), model_sites(24, [(1024, 1024)] * 2)
LLAMA7 = model_sites(32, [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)])
LLAMA13 = model_sites(40, [(5120, 5120)] * 4 + [(5120, 13824)] * 2 + [(13824, 5120)])


@pytest.mark.parametrize(
    ("sites", "size"), [(BASE, 1_182_816), (LARGE, 3_145_728), (LLAMA7, 80_058_368), (LLAMA13, 124_983_520)]
)
def test_bytes_of_known_models(sites: list[Site], size: int) -> None:
    """Query and value of RoBERTa, all linear layers of Llama-2; rhat = round(sqrt((d_in + d_out) r))."""
    assert 4 * MoRA(kind="share").count(sites) == size
    lora = sum(8 * (s.d_in + s.d_out) for s in sites)
    assert MoRA().count(sites) == pytest.approx(lora, rel=0.02)
    assert all(MoRA().side(s) % 2 == 0 for s in sites)


def test_starts_at_zero_with_as_many_numbers_as_it_counts() -> None:
    sites = [site(30, 20, "a"), site(8, 50, "b")]
    theta = MoRA(r=2).init(sites, {}, 3, generator(0))
    assert not any(value.any() for value in theta.values())
    assert tree.numbers(theta) == MoRA(r=2).count(sites)
    assert theta["b/M"].shape == (3, 8, 8)  # sqrt(116) is 10.8, more than its 8 inputs


def test_every_number_of_a_matrix_has_an_effect() -> None:
    for kind in ("share", "rotate"):
        operator = built(MoRA(r=30, kind=kind), site(40, 6))
        matrix = operator.M.clone().requires_grad_()
        out = Square(matrix, operator.cos, operator.sin, 6)(
            torch.randn(1, 4, 40, dtype=torch.float64, generator=generator(3))
        )
        out.square().sum().backward()
        assert matrix.grad is not None
        assert int((matrix.grad == 0).sum()) == 0


def test_adapters_of_different_ranks_do_not_share_angles() -> None:
    at, x = site(40, 40), torch.randn(1, 3, 40, generator=generator(4))
    alone = built(MoRA(r=2), at, dtype=torch.float32)(x)
    built(MoRA(r=7), at, dtype=torch.float32)(x)
    assert torch.equal(built(MoRA(r=2), at, dtype=torch.float32)(x), alone)


@pytest.mark.parametrize("kind", ["share", "rotate"])
def test_merged_weights_are_the_base_plus_the_written_out_matrix(kind: str) -> None:
    model = tiny_model(MoRA(r=3, kind=kind))
    theta = perturbed(tiny_start(model, [0]))
    host.write(model, theta)
    before = {s.name: s.weight().clone() for s in host.sites(model)}
    model.merge_adapter()  # type: ignore[operator]
    for s in host.sites(model):
        wanted = written_out(theta[f"{s.name}/M"][0].double().numpy(), s.d_in, s.d_out, kind)
        np.testing.assert_allclose((s.weight() - before[s.name]).numpy(), wanted, rtol=0, atol=2e-6)


def test_only_rotated_matrices_learn_faster_and_heads_never() -> None:
    leaves = {"a/M": torch.zeros(1, 2, 2), "head/weight": torch.zeros(1, 2, 2)}
    assert parametrise.rates(MoRA(), leaves) == {"a/M": 3.0}
    assert parametrise.rates(MoRA(kind="share"), leaves) == {}


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="r must be at least 1, found 0"):
        MoRA(r=0)
    with pytest.raises(ValueError, match="kind must be rotate or share, found 'rope'"):
        MoRA(kind="rope")
    with pytest.raises(ValueError, match="a maps 9 to 1 numbers: too few to rotate"):
        MoRA().side(site(9, 1))
    assert MoRA(kind="share").side(site(9, 1)) == 1
