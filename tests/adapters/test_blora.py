from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from kilobayes import host, tree
from kilobayes.adapters import BLoRA, LoRA, bits
from kilobayes.host import compact
from kilobayes.posteriors import Point
from kilobayes.random import Streams, generator
from kilobayes.testing.tiny import TinyRows, nll, perturbed, scores, tiny_base, tiny_model, tiny_start
from kilobayes.train import Settings, fit
from kilobayes.tree import leaves_of
from kilobayes.types import LowRank, Params, Progress, Site

PROGRESS = Progress(3, 10, 5, 37)
METHOD = BLoRA(r=5, alpha=3.0)


def site(name: str, d_in: int, d_out: int) -> Site:
    return Site(name, d_in, d_out, lambda: torch.empty(d_out, d_in, device="meta"))


SITES = [site("q", 12, 7), site("v", 9, 16)]


def some(method: BLoRA = METHOD, stack: int = 3) -> Params:
    """Leaves away from the start, whose gates are decided at random."""
    gen = generator(4)
    theta = method.init(SITES, {}, stack, gen)
    for key, value in theta.items():
        leaf = key.rpartition("/")[2]
        size = 3.0 if leaf in ("bits", "rank") else 0.3
        theta[key] = value * (leaf != "bits") + size * torch.randn(value.shape, generator=gen)
    theta["q/bits"][0] = 2.0
    return theta


def built(method: BLoRA, theta: Params, of: Site) -> LowRank:
    return method.build(leaves_of(theta, of.name), {}, of)


def set_widths(theta: Params, of: Site, a: int, b: int, rank: int | None = None) -> None:
    for which, width in enumerate((a, b)):
        theta[f"{of.name}/bits"][:, which] = 6.0
        theta[f"{of.name}/bits"][:, which, bits.WIDTHS.index(width) :] = -6.0
    if rank is not None:
        theta[f"{of.name}/rank"][:] = 6.0
        theta[f"{of.name}/rank"][:, rank - 1 :] = -6.0


def test_training_starts_at_the_base_with_every_gate_open() -> None:
    theta = METHOD.init(SITES, {}, 2, generator(1))
    for of in SITES:
        found = built(METHOD, theta, of)
        assert not found.B.any()
        lora = LoRA(5).init(SITES, {}, 2, generator(1))
        assert torch.allclose(found.A, lora[f"{of.name}/A"], atol=1e-7)
    found = METHOD.structure(theta, SITES)
    assert found.ranks.tolist() == [[5, 5]] * 2
    assert found.widths.unique().tolist() == [32]


def test_wide_open_it_is_lora() -> None:
    theta = perturbed(METHOD.init(SITES, {}, 2, generator(1)))
    for of in SITES:
        theta[f"{of.name}/clip"] += 5.0
        ours = built(METHOD, theta, of)
        theirs = LoRA(5, alpha=3.0).build(leaves_of(theta, of.name), {}, of)
        assert torch.equal(ours.A, theirs.A)
        assert torch.allclose(ours.B, theirs.B, atol=1e-7)


def test_factors_are_gated_and_quantised() -> None:
    theta = some()
    set_widths(theta, SITES[0], 4, 8, rank=3)
    leaves = leaves_of(theta, "q")
    found = built(METHOD, theta, SITES[0])
    clip = leaves["clip"].exp()
    a = bits.values(bits.codes(leaves["A"], clip[:, 0], 4), clip[:, 0], 4)
    b = bits.values(bits.codes(leaves["B"], clip[:, 1], 8), clip[:, 1], 8)
    assert torch.equal(found.A[:, :3], a[:, :3])
    assert not found.A[:, 3:].any()
    assert torch.equal(found.B[:, :, :3], 0.6 * b[:, :, :3])
    assert not found.B[:, :, 3:].any()


def test_drawn_gates_multiply_ranks_and_widths() -> None:
    theta = METHOD.drop(some(), Streams([generator(m) for m in range(3)]))
    leaves = leaves_of(theta, "v")
    found, g = built(METHOD, theta, SITES[1]), leaves["rank_drawn"].cumprod(dim=1)
    clip, gates = leaves["clip"].exp(), leaves["bits_drawn"]
    a = bits.quantise(leaves["A"], clip[:, 0], gates[:, 0])
    b = bits.quantise(leaves["B"], clip[:, 1], gates[:, 1])
    want = torch.einsum("sor,sr,sri->soi", b, torch.cat([torch.ones(3, 1), g], dim=1), a)
    assert torch.allclose(found.B @ found.A, 0.6 * want, atol=1e-6)
    assert ((gates > 0) & (gates < 1)).any()
    assert (gates == 0).any()
    assert (gates == 1).any()


def test_the_noise_of_a_member_is_its_own() -> None:
    theta = some()
    together = METHOD.drop(theta, Streams([generator(m) for m in range(3)]))
    alone = METHOD.drop(tree.member(theta, 1), Streams([generator(1)]))
    assert not tree.first_difference(alone, tree.member(together, 1))
    assert all(torch.equal(together[k], v) for k, v in theta.items())


def test_draws_keep_the_structure_of_what_they_are_drawn_around() -> None:
    around = some()
    draws = {
        k: (v + 5.0 * torch.randn(v.shape, generator=generator(9))).requires_grad_()
        for k, v in around.items()
    }
    kept = METHOD.restrict(draws, around, None)
    found, want, else_ = (METHOD.structure(t, SITES) for t in (kept, around, draws))
    assert torch.equal(found.ranks, want.ranks)
    assert torch.equal(found.widths, want.widths)
    assert not torch.equal(found.widths, else_.widths)
    assert kept["q/A"] is draws["q/A"]
    sum(built(METHOD, kept, of).B.square().sum() for of in SITES).backward()  # type: ignore[union-attr]
    gradient = draws["q/bits"].grad
    assert gradient is not None
    assert not gradient.any()
    assert METHOD.restrict(draws, around, PROGRESS) == draws


def test_the_penalty_is_the_price_of_open_gates() -> None:
    method = replace(METHOD, bits_prior=0.7, rank_prior=0.2)
    theta = some()
    found = method.penalty(theta, PROGRESS)
    for m in range(3):
        total = 0.0
        for of in SITES:
            gates = [(0.7, theta[f"{of.name}/bits"][m, which].tolist()) for which in range(2)]
            for price, logits in [*gates, (0.2, theta[f"{of.name}/rank"][m].tolist())]:
                chain = 1.0
                for phi in logits:
                    chain /= 1.0 + math.exp(-phi - 2.0 / 3.0 * math.log(11.0))
                    total += price * chain
        assert float(found[m]) == pytest.approx(total, rel=1e-5)


def test_without_prices_there_is_no_penalty() -> None:
    assert torch.equal(
        replace(METHOD, bits_prior=0.0, rank_prior=0.0).penalty(some(), PROGRESS), torch.zeros(3)
    )


def test_the_penalty_closes_gates_that_gain_nothing() -> None:
    theta = {k: v.requires_grad_() for k, v in METHOD.init(SITES, {}, 2, generator(1)).items()}
    method, before = METHOD, METHOD.operations(theta, SITES)
    for _ in range(60):
        gates = [v for k, v in theta.items() if k.rpartition("/")[2] in ("bits", "rank")]
        for gate, gradient in zip(
            gates, torch.autograd.grad(method.penalty(theta, PROGRESS).sum(), gates), strict=True
        ):
            assert (gradient > 0).all()
            with torch.no_grad():
                gate -= 0.1 * gradient.sign()
    found = METHOD.structure(theta, SITES)
    assert found.ranks.unique().tolist() == [1]
    assert found.widths.unique().tolist() == [2]
    assert (METHOD.operations(theta, SITES) * (5 * 16) == before).all()


def test_structure_is_nested() -> None:
    theta = some()
    theta["q/rank"] = torch.tensor([[1.0, 2.0, -3.0, 5.0]]).expand(3, -1)
    theta["q/bits"] = torch.tensor([[[1.0, -2.0, 3.0, 5.0], [-1.0, 4.0, 4.0, 4.0]]]).expand(3, -1, -1)
    found = METHOD.structure(theta, SITES)
    assert found.ranks[:, 0].tolist() == [3] * 3
    assert found.widths[:, 0].tolist() == [[4, 2]] * 3


def test_bit_operations_by_hand() -> None:
    theta = some(stack=1)
    set_widths(theta, SITES[0], 4, 2, rank=3)
    set_widths(theta, SITES[1], 16, 32, rank=1)
    by_hand = 3 * 12 * 4 * 32 + 7 * 3 * 2 * 32 + 1 * 9 * 16 * 32 + 16 * 1 * 32 * 32
    assert METHOD.operations(theta, SITES).tolist() == [by_hand]


def test_all_open_the_bit_operations_are_loras() -> None:
    theta = METHOD.init(SITES, {}, 2, generator(1))
    assert METHOD.operations(theta, SITES).tolist() == [5 * (12 + 7 + 9 + 16) * 1024] * 2


@pytest.mark.parametrize("r", [1, 5])
def test_the_packed_file_gives_the_same_update_bit_for_bit(r: int) -> None:
    method = replace(METHOD, r=r)
    theta = some(method, stack=6)
    found = method.structure(theta, SITES)
    assert set(found.widths.flatten().tolist()) == set(bits.WIDTHS)
    assert len(set(found.ranks.flatten().tolist())) == min(r, 4)
    packed = load(save(method.pack(theta, SITES)))
    back = method.unpack(packed, SITES)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in theta.items()}
    for of in SITES:
        ours, theirs = built(method, theta, of), built(method, back, of)
        assert torch.equal(ours.A, theirs.A)
        assert torch.equal(ours.B, theirs.B)
    again = method.pack(back, SITES)
    assert all(torch.equal(again[k], packed[k]) for k in packed)


@pytest.mark.parametrize("width", bits.WIDTHS)
def test_packed_bytes(width: int) -> None:
    theta = some(stack=2)
    for of in SITES:
        set_widths(theta, of, width, width, rank=3)
    packed = METHOD.pack(theta, SITES)
    factors = sum(math.ceil(3 * d * width / 8) for d in (12, 7, 9, 16))
    assert tree.total_bytes(packed.values()) == 2 * (factors + 2 * (2 + 2 + 8))
    assert len(packed) == 4


def test_before_training_the_packed_file_is_as_large_as_it_can_be() -> None:
    theta = METHOD.init(SITES, {}, 1, generator(1))
    assert tree.total_bytes(METHOD.pack(theta, SITES).values()) == METHOD.stored(SITES)
    assert tree.total_bytes(METHOD.pack(some(stack=1), SITES).values()) < METHOD.stored(SITES)


def llama(width: int, inner: int, layers: int) -> list[tuple[int, int]]:
    return [*[(width, width)] * 4, *[(width, inner)] * 2, (inner, width)] * layers


@pytest.mark.parametrize(
    ("shapes", "lora"),
    [
        ([(768, 768)] * 24, 1_179_648),
        ([(1024, 1024)] * 48, 3_145_728),
        (llama(4096, 11008, 32), 639_631_360 // 8),
        (llama(5120, 13824, 40), 1_001_390_080 // 8),
    ],
)
def test_counts_and_bytes(shapes: list[tuple[int, int]], lora: int) -> None:
    sites = [site(str(i), *shape) for i, shape in enumerate(shapes)]
    plain = 4 * 8 * sum(i + o for i, o in shapes)
    assert plain == lora
    assert BLoRA(r=8).stored(sites) == plain + 12 * len(sites)
    assert BLoRA(r=8).count(sites) == plain // 4 + 17 * len(sites)


def test_what_is_trained_is_what_is_packed(tmp_path: Path) -> None:
    method = BLoRA(r=3, bits_prior=2.0, rank_prior=2.0)
    model, rows = tiny_model(method), TinyRows.make(24)
    settings = Settings(lr=2e-2, epochs=5, batch_size=8, seeds=(1, 2))
    trained = fit(model, rows, nll, Point(), tiny_start(model, [1, 2]), settings)
    theta, sites = trained.state.theta, host.sites(model)
    open_ = method.operations(tiny_start(model, [1, 2]), sites)
    assert (method.operations(theta, sites) < open_ // 4).all()
    host.write(model, theta)
    report = compact.export_compact(model, tmp_path)
    assert report["error"] == 0.0
    assert report["adapter"] < 0.3 * 2 * method.stored(sites)
    back = host.read(compact.load_compact(tiny_base(), tmp_path))
    with torch.no_grad():
        assert torch.equal(scores(model, theta, rows), scores(model, tree.clone(back), rows))


@pytest.mark.parametrize(
    "wrong", [{"r": 0}, {"bits_prior": -1.0}, {"rank_prior": math.inf}, {"start": -0.1}, {"speed": 0.0}]
)
def test_settings_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BLoRA(**wrong)  # type: ignore[arg-type]
