"""NOLA against explicit sums, its dense basis against the one that is never held, and the paper's counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from kilobayes import counter, host, parametrise, tree
from kilobayes.adapters import NOLA, nola
from kilobayes.random import generator
from kilobayes.testing.tiny import TinyRows, close, perturbed, tiny_base, tiny_model, tiny_start
from kilobayes.types import LowRank, Params, Site, delta


def site(name: str, d_in: int, d_out: int) -> Site:
    return Site(name, d_in, d_out, lambda: torch.empty(d_out, d_in, device="meta"))


SITES = [site("a", 6, 4), site("b", 3, 9), site("c", 6, 6)]
METHODS = [
    NOLA(r=2, k=5, alpha=3.0, seed=4),
    NOLA(r=2, k=5, alpha=3.0, seed=4, held=0),
    NOLA(r=2, k=5, alpha=3.0, seed=4, basis="shape"),
    NOLA(r=2, k=5, alpha=3.0, seed=4, basis="shape", held=0),
]


def build(method: NOLA, theta: Params, where: Site, constants: Params | None = None) -> LowRank:
    constants = method.freeze(SITES) if constants is None else constants
    return method.build(tree.leaves_of(theta, where.name), tree.leaves_of(constants, where.name), where)


def away(method: NOLA, stack: int = 2, sites: list[Site] = SITES) -> Params:
    """Coefficients away from their start."""
    return perturbed(method.init(sites, {}, stack, generator(1)), size=1.0)


def rows(method: NOLA, where: Site, leaf: str) -> Tensor:
    """The basis of a site, matrix by matrix, in double precision."""
    width = where.d_in if leaf == "A" else where.d_out
    shape = (method.r, width) if leaf == "A" else (width, method.r)
    count = method.r * width
    drawn = [counter.uniform(method.key(where, leaf), i * count, count) for i in range(method.k)]
    return torch.stack([2 * u.double().view(shape) - 1 for u in drawn])


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_the_update_is_the_formula(method: NOLA) -> None:
    theta, constants = away(method), method.freeze(SITES)
    for where in SITES:
        found = delta(build(method, theta, where), where.d_in)
        for member in range(2):
            start = constants[f"{where.name}/start"].double()
            c = method.k**-0.5
            a, b = start.clone(), torch.zeros(where.d_out, method.r, dtype=torch.float64)
            for i in range(method.k):
                a += c * theta[f"{where.name}/mix_A"][member, i].double() * rows(method, where, "A")[i]
                b += c * theta[f"{where.name}/mix_B"][member, i].double() * rows(method, where, "B")[i]
            assert close(found[member].double(), 3.0 / 2 * b @ a, 1e-6)


FROZEN_A = [[-3362174, -85761, 6450125], [7583604, -6810157, 551084]]
FROZEN_B = [[8327669, 5142022], [-2345071, 1661727]]
FROZEN_START = [[1781492, -5817480, -677356]]


def test_what_a_seed_gives_is_frozen() -> None:
    # files hold the seed alone, so these numbers may never change
    where, method = site("bert.encoder.layer.0.attention.self.query", 3, 2), NOLA(r=1, k=2)
    constants = method.freeze([where])
    assert (constants[f"{where.name}/basis_A"] * 2**23).tolist() == FROZEN_A
    assert (constants[f"{where.name}/basis_B"] * 2**23).tolist() == FROZEN_B
    assert (constants[f"{where.name}/start"] * 3**0.5 * 2**23).round().tolist() == FROZEN_START


def test_numbers_are_uniform_and_the_start_is_loras() -> None:
    wide = site("a", 100, 50)
    method = NOLA(r=8, k=40)
    constants = method.freeze([wide])
    for key in ("a/basis_A", "a/basis_B"):
        basis = constants[key].double()
        n = basis.numel()
        assert 0.999 < float(basis.abs().max()) <= 1.0
        assert abs(float(basis.mean())) < 5 / (3 * n) ** 0.5
        assert abs(float(basis.square().mean()) - 1 / 3) < 5 * (4 / 45 / n) ** 0.5
    gram = constants["a/basis_A"] @ constants["a/basis_A"].T * 3 / 800  # the identity, in expectation
    assert float((gram - torch.eye(40)).abs().max()) < 5 / 800**0.5
    start = constants["a/start"]
    assert 0.09 < float(start.abs().max()) <= 0.1
    assert abs(float(start.square().mean()) * 300 - 1) < 5 * (4 / 5 / 800) ** 0.5


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_it_starts_at_the_base_model_with_a_gradient_in_b_alone(method: NOLA) -> None:
    leaves = {k: v.requires_grad_() for k, v in method.init(SITES, {}, 2, generator(1)).items()}
    found = [delta(build(method, leaves, where), where.d_in) for where in SITES]
    assert not any(bool(value.any()) for value in found)
    torch.stack([value.sum() for value in found]).sum().backward()
    for key, leaf in leaves.items():
        assert leaf.grad is not None
        assert bool(leaf.grad.abs().amin(dim=1).all()) == key.endswith("/mix_B")


@pytest.mark.parametrize("kind", ["matrix", "shape"])
@pytest.mark.parametrize("piece", [1, 30, 1 << 22])
def test_a_basis_that_is_not_held_gives_the_same(
    kind: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = NOLA(r=3, k=7, basis=kind)
    light = NOLA(r=3, k=7, basis=kind, held=0)
    assert set(light.freeze(SITES)) == {f"{where.name}/start" for where in SITES}
    theta, held = away(dense), dense.freeze(SITES)
    monkeypatch.setattr(nola, "PIECE", piece)
    for where in SITES:
        gradients, factors = [], []
        for method, constants in ((dense, held), (light, light.freeze(SITES))):
            leaves = {k: v.clone().requires_grad_() for k, v in tree.leaves_of(theta, where.name).items()}
            built = method.build(leaves, tree.leaves_of(constants, where.name), where)
            (built.A.sin().sum() + built.B.cos().sum()).backward()
            gradients.append({k: v.grad for k, v in leaves.items()})
            factors.append(built)
        assert close(factors[1].A.detach(), factors[0].A.detach(), 1e-6)
        assert close(factors[1].B.detach(), factors[0].B.detach(), 1e-6)
        for key, value in gradients[0].items():
            assert value is not None
            assert close(gradients[1][key], value, 1e-6)  # type: ignore[arg-type]


def test_pieces_of_the_basis_change_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    method = NOLA(r=3, k=7)
    whole = method.freeze(SITES)
    monkeypatch.setattr(nola, "PIECE", 40)
    assert not tree.first_difference(method.freeze(SITES), whole)


def test_gradients_of_any_order_pass_torchs_own_check() -> None:
    mix = torch.randn(2, 5, dtype=torch.float64, generator=generator(1)).requires_grad_()

    def mixture(x: Tensor) -> Tensor:
        return nola._Mixture.apply(x, 7, 12)

    assert torch.autograd.gradcheck(mixture, mix)
    assert torch.autograd.gradgradcheck(mixture, mix)


def test_autograd_keeps_nothing_of_the_basis() -> None:
    method, wide = NOLA(r=4, k=64, held=0), site("a", 50, 60)
    leaves = {k: v.requires_grad_() for k, v in tree.leaves_of(away(method, 2, [wide]), "a").items()}
    constants = tree.leaves_of(method.freeze([wide]), "a")
    kept: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        kept.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        built = method.build(leaves, constants, wide)
    assert built.A.requires_grad
    assert sum(value.numel() for value in kept) < 4 * 50  # the basis has 64 times as many


def test_a_basis_is_held_up_to_the_limit() -> None:
    one = [site("a", 256, 256)]  # 4 bytes * 128 * 4 * 512 = 1 MiB
    assert "a/basis_A" in NOLA(r=4, k=128, held=1).freeze(one)
    assert "a/basis_A" not in NOLA(r=4, k=129, held=1).freeze(one)
    two = [*one, site("b", 256, 256)]
    assert "a/basis_A" not in NOLA(r=4, k=128, held=1).freeze(two)
    assert set(NOLA(r=4, k=128, held=1, basis="shape").freeze(two)) == {
        "a/start", "b/start", "*/basis_A_256", "*/basis_B_256",
    }  # fmt: skip


def test_a_seed_for_each_matrix_or_for_each_shape() -> None:
    own, shared = NOLA(r=2, k=3, held=0), NOLA(r=2, k=3, held=0, basis="shape")
    keys = [own.key(where, leaf) for where in SITES for leaf in ("A", "B", "start")]
    assert len(set(keys)) == len(keys)
    a, b, c = SITES
    assert shared.key(a, "A") == shared.key(c, "A") != shared.key(b, "A")
    assert shared.key(c, "A") != shared.key(c, "B")
    assert shared.key(a, "start") != shared.key(c, "start")
    assert NOLA(seed=1).key(a, "A") != NOLA().key(a, "A")


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_site_is_the_same_among_other_sites(method: NOLA) -> None:
    theta, one = away(method), SITES[2]
    alone = build(method, theta, one, method.freeze([one]))
    among = build(method, theta, one, method.freeze(SITES[::-1]))
    assert torch.equal(alone.A, among.A)
    assert torch.equal(alone.B, among.B)


@pytest.mark.parametrize("held", [0, 1024])
def test_global_generator_is_untouched(held: int) -> None:
    method, before = NOLA(r=2, k=5, held=held), torch.random.get_rng_state()
    leaves = {k: v.requires_grad_() for k, v in away(method).items()}
    build(method, leaves, SITES[0]).A.sum().backward()
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("held", [0, 1024])
def test_merging_keeps_the_adapter(held: int) -> None:
    method, data = NOLA(r=2, k=9, held=held), TinyRows.make(6)
    model = tiny_model(method)
    host.write(model, perturbed(tiny_start(model, [4]), size=1.0))
    inputs, _ = data.batch(torch.arange(len(data)))
    with torch.no_grad():
        beside = model(**inputs).logits
        with model.disable_adapter():
            without = model(**inputs).logits
        merged = model.merge_and_unload(safe_merge=True)(**inputs).logits
    assert not close(without, beside, 0.05)
    assert close(merged, beside, 1e-5)


def test_the_checkpoint_holds_coefficients_and_comes_back_to_the_same_scores(tmp_path: Path) -> None:
    method, data = NOLA(r=3, k=20, seed=5), TinyRows.make(6)
    model = tiny_model(method)
    host.write(model, perturbed(tiny_start(model, [4]), size=1.0))
    inputs, _ = data.batch(torch.arange(len(data)))
    model.save_pretrained(str(tmp_path))
    held = load_file(tmp_path / "adapter_model.safetensors")
    vectors = {key: value for key, value in held.items() if "kilobayes_leaves" in key}
    assert sum(value.numel() for value in vectors.values()) == method.count(host.sites(model))
    assert {tuple(value.shape) for value in vectors.values()} == {(1, 20)}
    back = PeftModel.from_pretrained(tiny_base(), str(tmp_path)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.equal(back(**inputs).logits, model(**inputs).logits)


def test_the_basis_is_float32_whatever_the_base() -> None:
    method = NOLA(r=3, k=20)
    full, half = tiny_model(method), tiny_model(method, base=tiny_base().to(torch.bfloat16))
    for one, other in zip(host.layers(full).values(), host.layers(half).values(), strict=True):
        assert not tree.first_difference(one.constants["default"], other.constants["default"])
        assert {v.dtype for v in other.constants["default"].values()} == {torch.float32}


@pytest.mark.parametrize(
    ("k", "matrices", "numbers"),
    [  # Llama-2 7B, 13B and 70B, all linear layers, as in the paper; RoBERTa-base, query and value
        (128, 32 * 7, 57_344),
        (256, 40 * 7, 143_360),
        (512, 80 * 7, 573_440),
        (256, 24, 12_288),
    ],
)
def test_counts_are_the_papers(k: int, matrices: int, numbers: int) -> None:
    assert NOLA(r=16, k=k).count([site(str(n), 4096, 4096) for n in range(matrices)]) == numbers


@pytest.mark.parametrize("options", [{"r": 0}, {"k": 0}, {"held": -1}, {"basis": "layer"}])
def test_settings_that_cannot_train_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        NOLA(**options)  # type: ignore[arg-type]


def test_coefficients_learn_faster_than_the_head() -> None:
    method = NOLA()
    theta = method.init(SITES, {}, 1, generator(1)) | {"classifier/weight": torch.zeros(1, 2, 3)}
    found = parametrise.rates(method, theta)
    assert set(found) == set(theta) - {"classifier/weight"}
    assert set(found.values()) == {3.0}
