"""VB-LoRA against loops in numpy, the paper's formulas of size, and the invariants of a bank."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from kilobayes import tree
from kilobayes.adapters.vblora import NEVER, VBLoRA
from kilobayes.posteriors import SWAG
from kilobayes.random import generator
from kilobayes.types import LowRank, Params, Progress, Site, delta


def site(name: str, d_in: int, d_out: int) -> Site:
    return Site(name, d_in, d_out, weight=lambda: torch.empty(d_out, d_in, device="meta"))


SITES = [site("first/q", 24, 16), site("second/up", 16, 40), site("second/down", 40, 16)]
OTHER = VBLoRA(r=3, h=11, b=4, k=3)


def start(adapter: VBLoRA, stack: int = 2, spread: float = 1.0) -> Params:
    """Leaves as they may be after training, weights of a piece far apart."""
    gen = generator(3)
    theta = adapter.init(SITES, {}, stack, gen)
    return {k: v + spread * torch.randn(v.shape, generator=gen) for k, v in theta.items()}


def built(adapter: VBLoRA, theta: Params) -> dict[str, LowRank]:
    return {s.name: adapter.build(tree.leaves_of(theta, s.name), {}, s) for s in SITES}


def same(a: dict[str, LowRank], b: dict[str, LowRank]) -> None:
    for name in a:
        assert torch.equal(a[name].A, b[name].A)
        assert torch.equal(a[name].B, b[name].B)


def logits(theta: Params) -> dict[str, Tensor]:
    return {k: v for k, v in theta.items() if "logits" in k}


def pieces(bank: np.ndarray, rows: np.ndarray, k: int) -> np.ndarray:
    """One piece after another, each a loop over its k largest logits."""
    out = np.zeros((*rows.shape[:-1], bank.shape[1]))
    for at in np.ndindex(rows.shape[:-1]):
        best = sorted(range(len(bank)), key=lambda j: -rows[at][j])[:k]
        weights = np.exp([rows[at][j] for j in best])
        for weight, j in zip(weights / weights.sum(), best, strict=True):
            out[at] += weight * bank[j]
    return out


@pytest.mark.parametrize("k", [1, 2, 3, 11])
def test_factors_are_pieces_of_the_bank(k: int) -> None:
    adapter = VBLoRA(r=3, h=11, b=4, k=k)
    theta = start(adapter)
    for s, operator in zip(SITES, built(adapter, theta).values(), strict=True):
        for member in range(2):
            bank = theta["*/bank"][member].double().numpy()
            a = pieces(bank, theta[f"{s.name}/logits_A"][member].double().numpy(), k)  # (r, d_in / b, b)
            b = pieces(bank, theta[f"{s.name}/logits_B"][member].double().numpy(), k)  # (d_out / b, r, b)
            columns = [np.concatenate([b[tile, rank] for tile in range(len(b))]) for rank in range(3)]
            update = np.stack(columns, 1) @ np.stack([np.concatenate(list(row)) for row in a])
            np.testing.assert_allclose(delta(operator, s.d_in)[member].numpy(), update, atol=1e-4)


def test_a_member_of_a_stack_is_the_member_alone() -> None:
    theta = start(OTHER, stack=4)
    together = built(OTHER, theta)
    for member in range(4):
        alone = built(OTHER, tree.member(theta, member))
        same(alone, {k: LowRank(v.A[member, None], v.B[member, None]) for k, v in together.items()})


def llama(width: int, inner: int, blocks: int) -> list[Site]:
    shapes = [(width, width)] * 4 + [(width, inner)] * 2 + [(inner, width)]
    return [site(f"{block}.{i}", *shape) for block in range(blocks) for i, shape in enumerate(shapes)]


def encoder(width: int, blocks: int) -> list[Site]:
    return [site(f"{block}.{name}", width, width) for block in range(blocks) for name in ("query", "value")]


@pytest.mark.parametrize(
    ("sites", "adapter", "trained", "stored"),
    [  # 576, 1,536, 39,040 and 91,680 pieces
        (encoder(768, 12), VBLoRA(b=256), 90 * 256 + 576 * 90, 95_616),
        (encoder(1024, 24), VBLoRA(), 90 * 256 + 1536 * 90, 101_376),
        (llama(4096, 11008, 32), VBLoRA(h=2048, b=256), 80_478_208, 2_409_472),
        (llama(5120, 13824, 40), VBLoRA(r=6, h=2048), 2048 * (256 + 91_680), 2_830_592),
    ],
)
def test_sizes_are_the_papers(sites: list[Site], adapter: VBLoRA, trained: int, stored: int) -> None:
    assert adapter.length(sites) == 256
    assert (adapter.count(sites), adapter.stored(sites)) == (trained, stored)


@pytest.mark.parametrize("h", [5, 256, 257, 70_000])
@pytest.mark.parametrize("k", [1, 3])
def test_bytes_in_the_file_are_those_that_are_said(h: int, k: int) -> None:
    adapter, few = VBLoRA(r=1, h=h, b=4, k=k), SITES[:1]
    theta = adapter.init(few, {}, 1, generator(1))
    assert tree.numbers(theta) == adapter.count(few)
    packed = adapter.pack(theta, few)
    assert tree.total_bytes(packed.values()) == adapter.stored(few)
    assert len(save(packed)) < adapter.stored(few) + 300


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("h", "k"), [(11, 1), (11, 2), (11, 3), (300, 5), (11, 11)])
def test_the_packed_update_is_the_same_bit_for_bit(dtype: torch.dtype, h: int, k: int) -> None:
    # in bfloat16 many logits are equal, and so they are with few distinct values
    adapter = VBLoRA(r=3, h=h, b=4, k=k)
    for theta in (start(adapter), start(adapter, spread=30.0), start(adapter, spread=0.0)):
        theta = {key: v.to(dtype) for key, v in theta.items()}
        tied = {key: v if key == "*/bank" else v.round(decimals=0) for key, v in theta.items()}
        for leaves in (theta, tied):
            back = adapter.unpack(load(save(adapter.pack(leaves, SITES))), SITES)
            same(built(adapter, back), built(adapter, leaves))


def test_what_is_unpacked_can_be_trained_on_and_keeps_its_choice() -> None:
    theta = OTHER.unpack(OTHER.pack(start(OTHER), SITES), SITES)
    before = {k: v > NEVER / 2 for k, v in logits(theta).items()}
    losses = []
    for _ in range(20):
        leaves = {k: v.requires_grad_() for k, v in theta.items()}
        loss: Any = sum(
            (v.A - 0.3).square().mean() + v.B.square().mean() for v in built(OTHER, leaves).values()
        )
        loss.backward()
        losses.append(loss.item())
        assert not any(leaves[k].grad[~chosen].any() for k, chosen in before.items())  # type: ignore[index]
        theta = {k: (v - 0.5 * v.grad).detach() for k, v in leaves.items()}
    assert losses[-1] < 0.9 * losses[0]
    for key, chosen in before.items():
        assert torch.equal(theta[key] > NEVER / 2, chosen)
        assert (theta[key][~chosen] == NEVER).all()


def close(one: Params, two: Params) -> None:
    for a, b in zip(built(OTHER, one).values(), built(OTHER, two).values(), strict=True):
        torch.testing.assert_close(a.A, b.A)
        torch.testing.assert_close(a.B, b.B)


def test_the_order_of_the_bank_is_a_convention() -> None:
    theta, order = start(OTHER), torch.randperm(11, generator=generator(4))
    close(theta, {k: v[:, order] if k == "*/bank" else v[..., order] for k, v in theta.items()})


def test_a_constant_added_to_a_row_of_logits_changes_nothing() -> None:
    theta, gen = start(OTHER), generator(5)
    close(
        theta, theta | {k: v + torch.randn(v[..., :1].shape, generator=gen) for k, v in logits(theta).items()}
    )


def gradients(adapter: VBLoRA, theta: Params) -> Params:
    leaves = {k: v.clone().requires_grad_() for k, v in theta.items()}
    gen = generator(6)
    loss: Any = 0.0
    for operator in built(adapter, leaves).values():
        loss = loss + (operator.A * torch.randn(operator.A.shape, generator=gen)).sum()
        loss = loss + (operator.B * torch.randn(operator.B.shape, generator=gen)).sum()
    loss.backward()
    return {k: v.grad for k, v in leaves.items()}  # type: ignore[misc]


@pytest.mark.parametrize("k", [1, 2, 5])
def test_k_logits_of_a_piece_have_gradients_and_one_alone_has_none(k: int) -> None:
    adapter = VBLoRA(r=3, h=11, b=4, k=k)
    found = gradients(adapter, start(adapter, stack=1))
    moved = sum(int(v.count_nonzero()) for v in logits(found).values())
    assert moved == (0 if k == 1 else adapter.pieces(SITES) * k)
    assert found["*/bank"].any()


def test_gradients_are_those_of_finite_differences() -> None:
    theta = {k: v.double().requires_grad_() for k, v in start(OTHER).items() if k.startswith(("*", "first"))}

    def update(*leaves: Tensor) -> Tensor:
        own = dict(zip(("bank", "logits_A", "logits_B"), leaves, strict=True))
        return delta(OTHER.build(own, {}, SITES[0]), 24)

    assert torch.autograd.gradcheck(update, tuple(theta.values()), fast_mode=True)


def test_the_update_starts_small_but_not_at_zero() -> None:
    wide, adapter = [site("s", 768, 768)], VBLoRA()
    theta = adapter.init(wide, {}, 3, generator(8))
    assert theta["*/bank"].abs().max() <= 0.02
    assert theta["s/logits_A"].std() == pytest.approx(0.1, rel=0.05)
    update = delta(adapter.build(tree.leaves_of(theta, "s"), {}, wide[0]), 768)
    # two vectors in about equal parts: a factor's entries have the variance (0.02^2 / 3) / 2
    assert update.std() == pytest.approx(4**0.5 * 0.02**2 / 6, rel=0.1)


def test_the_length_is_the_largest_that_fits() -> None:
    minilm = [site("query", 384, 384), site("intermediate", 384, 1536)]
    assert VBLoRA().length(minilm) == 128
    assert VBLoRA().length([site("q", 768, 768)]) == VBLoRA().length([site("q", 4096, 11008)]) == 256
    with pytest.raises(ValueError, match="found b=256 and 384 at query; b=192 divides all of them"):
        VBLoRA(b=256).init(minilm, {}, 1, generator(1))
    for wrong in ({"r": 0}, {"h": 0}, {"b": 0}, {"k": 0}, {"h": 3, "k": 4}):
        with pytest.raises(ValueError, match="found"):
            VBLoRA(**wrong)
    assert repr(VBLoRA()) == "VBLoRA(r=4, h=90, b=None, k=2)"  # once and for all, wherever it sits


def choice(adapter: VBLoRA, theta: Params) -> dict[str, Tensor]:
    return {k: v.topk(adapter.k).indices.sort().values for k, v in logits(theta).items()}


def test_frozen_indices_stay_in_the_average_and_in_draws() -> None:
    theta = start(OTHER, spread=0.0) | {"head/weight": torch.ones(2, 3, 4)}
    frozen = OTHER.freeze_indices(theta, SITES)
    same(built(OTHER, frozen), built(OTHER, theta))
    assert torch.equal(frozen["head/weight"], theta["head/weight"])
    posterior, gen = SWAG(rank=2, start=0.0, snapshots=100), generator(9)

    def fitted(around: Params) -> Params:
        state = posterior.init(around, gen)
        for step in range(1, 7):
            moved = {k: v + torch.randn(v.shape, generator=gen) for k, v in around.items()}
            state = posterior.observe(state, moved, Progress(step, 6, 1, 10))
        return posterior.sample(state, 8, gen)

    wanted = {k: v.repeat_interleave(4, dim=0) for k, v in choice(OTHER, theta).items()}
    for key, found in choice(OTHER, fitted(frozen)).items():
        assert torch.equal(found, wanted[key])
    assert any(not torch.equal(v, wanted[k]) for k, v in choice(OTHER, fitted(theta)).items())


def test_draws_choose_what_the_weights_choose_that_they_are_drawn_around() -> None:
    theta = start(OTHER, spread=0.0)
    drawn = {k: v + torch.randn(v.shape, generator=generator(2)) for k, v in theta.items()}
    kept = OTHER.restrict(drawn, theta)
    assert torch.equal(kept["*/bank"], drawn["*/bank"])
    for key, chosen in choice(OTHER, theta).items():
        assert torch.equal(choice(OTHER, kept)[key], chosen)
        assert torch.equal(kept[key].gather(-1, chosen), drawn[key].gather(-1, chosen))
    same(built(OTHER, OTHER.restrict(theta, tree.clone(theta))), built(OTHER, theta))
