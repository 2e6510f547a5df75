"""VeRA against its formula, PEFT's draw and the paper's counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.vera.model import _kaiming_init
from safetensors.torch import load_file
from torch import Tensor

from kilobayes import host, parametrise, tree
from kilobayes.adapters import VeRA
from kilobayes.adapters.vera import projections
from kilobayes.random import Streams, generator
from kilobayes.testing.tiny import TinyRows, close, perturbed, scores, tiny_base, tiny_model, tiny_start
from kilobayes.types import Params, Site, delta


def site(name: str, d_in: int, d_out: int) -> Site:
    return Site(name, d_in, d_out, lambda: torch.empty(d_out, d_in, device="meta"))


SITES = [site("a", 6, 4), site("b", 3, 9), site("c", 5, 5)]


def start(method: VeRA, stack: int = 2) -> tuple[Params, Params]:
    constants = method.freeze(SITES)
    return method.init(SITES, constants, stack, generator(1)), constants


def updates(method: VeRA, theta: Params, constants: Params) -> dict[str, Tensor]:
    built = {
        s.name: method.build(tree.leaves_of(theta, s.name), tree.leaves_of(constants, s.name), s)
        for s in SITES
    }
    return {s.name: delta(built[s.name], s.d_in) for s in SITES}


@pytest.mark.parametrize("seed", [0, 7])
def test_projections_are_pefts_bit_for_bit(seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    theirs = _kaiming_init((5, 11), gen), _kaiming_init((7, 5), gen)
    before = torch.random.get_rng_state()
    ours = projections(5, 11, 7, seed)
    assert torch.equal(torch.random.get_rng_state(), before)
    for mine, their in zip(ours, theirs, strict=True):
        assert torch.equal(mine, their)
    assert not torch.equal(projections(5, 11, 7, seed + 1)[0], ours[0])


def test_projections_are_as_wide_as_the_widest_site_and_bounded() -> None:
    constants = VeRA(r=40).freeze(SITES)
    assert {key: tuple(value.shape) for key, value in constants.items()} == {"*/A": (40, 6), "*/B": (9, 40)}
    for key, fan in (("*/A", 6), ("*/B", 40)):
        bound = (6 / fan) ** 0.5
        assert 0.9 * bound < float(constants[key].abs().max()) <= bound


def test_the_update_is_the_formula() -> None:
    method = VeRA(r=7, d_initial=0.3, projection=5)
    theta, constants = start(method)
    theta = perturbed(theta, size=1.0)
    a, b = constants["*/A"].double(), constants["*/B"].double()
    for s in SITES:
        found = updates(method, theta, constants)[s.name]
        for member in range(2):
            up = torch.diag(theta[f"{s.name}/b"][member].double()) @ b[: s.d_out]
            down = torch.diag(theta[f"{s.name}/d"][member].double()) @ a[:, : s.d_in]
            assert close(found[member].double(), up @ down, 1e-6)


def test_it_starts_at_the_base_model_with_a_gradient_in_b_alone() -> None:
    method = VeRA(r=7, d_initial=-0.2)
    theta, constants = start(method)
    assert all(bool((value == -0.2).all()) for key, value in theta.items() if key.endswith("/d"))
    leaves = {key: value.requires_grad_() for key, value in theta.items()}
    found = updates(method, leaves, constants)
    assert all(not bool(value.any()) for value in found.values())
    sum(value.sum() for value in found.values()).backward()  # type: ignore[union-attr]
    for key, leaf in leaves.items():
        assert leaf.grad is not None
        assert bool(leaf.grad.any()) == key.endswith("/b")


def test_a_factor_may_move_from_b_to_d() -> None:
    method = VeRA(r=7)
    theta, constants = start(method)
    theta = perturbed(theta, size=1.0)

    def scaled(leaf: str, factor: float) -> dict[str, Tensor]:
        moved = {key: value * factor if key.endswith(leaf) else value for key, value in theta.items()}
        return updates(method, moved, constants)

    for s in SITES:
        assert torch.equal(scaled("/b", 4.0)[s.name], scaled("/d", 4.0)[s.name])  # a power of two is exact
        assert close(scaled("/b", -3.1)[s.name], scaled("/d", -3.1)[s.name], 1e-6)


def test_members_share_one_matrix_and_autograd_keeps_vectors() -> None:
    method, stack, large = VeRA(r=16), 5, site("a", 12, 20)
    constants = method.freeze([large])
    theta = perturbed(method.init([large], constants, stack, generator(1)))
    leaves = {key: value.requires_grad_() for key, value in tree.leaves_of(theta, "a").items()}
    frozen = tree.leaves_of(constants, "a")
    kept: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        kept.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        operator = method.build(leaves, frozen, large)
    assert operator.A.stride(0) == 0
    assert operator.A.data_ptr() == frozen["A"].data_ptr()
    assert not operator.A.requires_grad
    own = [value for value in kept if value.data_ptr() != frozen["B"].data_ptr()]
    assert own
    assert max(value.numel() for value in own) <= stack * 20


def test_adapters_of_different_rank_and_seed_share_a_model() -> None:
    rows = TinyRows.make(6)
    first, second = VeRA(r=12), VeRA(r=5, projection=3)
    for one, other in ((first, second), (second, first)):
        alone = tiny_model(other)
        theta = perturbed(tiny_start(alone, [4]), size=0.5)
        expected = scores(alone, theta, rows)
        model = tiny_model(one)
        config = host.KilobayesConfig(
            adapter=other, target_modules=["query", "value", "dense"], exclude_modules=["pooler.dense"]
        )
        model.add_adapter("other", config)
        model.set_adapter("other")
        inner = {key: value for key, value in theta.items() if not key.startswith("classifier")}
        host.write(model, inner | {k: v for k, v in host.read(model).items() if k not in inner})
        inputs, _ = rows.batch(torch.arange(len(rows)))
        hidden = {"output_hidden_states": True, **inputs}
        with torch.no_grad():
            found = model(**hidden).hidden_states[-1]
            host.write(alone, theta)
            wanted = alone(**hidden).hidden_states[-1]
        assert torch.equal(found, wanted)
        assert expected.shape == (1, 6, 3)
        model.set_adapter("default")  # the first still runs
        assert bool(torch.isfinite(model(**inputs).logits).all())


def test_the_checkpoint_holds_vectors_and_comes_back_to_the_same_scores(tmp_path: Path) -> None:
    method, rows = VeRA(r=64, projection=9), TinyRows.make(6)
    model = tiny_model(method)
    host.write(model, perturbed(tiny_start(model, [4]), size=0.5))
    inputs, _ = rows.batch(torch.arange(len(rows)))
    model.save_pretrained(str(tmp_path))
    held = load_file(tmp_path / "adapter_model.safetensors")
    vectors = {key: value for key, value in held.items() if "kilobayes_leaves" in key}
    assert sum(value.numel() for value in vectors.values()) == method.count(host.sites(model))
    assert max(value.numel() for value in vectors.values()) == 64
    back = PeftModel.from_pretrained(tiny_base(), str(tmp_path)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.equal(back(**inputs).logits, model(**inputs).logits)


def test_export_as_plain_lora_gives_the_same_scores(tmp_path: Path) -> None:
    model, rows = tiny_model(VeRA(r=6)), TinyRows.make(6)
    host.write(model, perturbed(tiny_start(model, [4]), size=0.5))
    inputs, _ = rows.batch(torch.arange(len(rows)))
    host.export_lora(model, tmp_path)
    plain = PeftModel.from_pretrained(tiny_base(), str(tmp_path)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        assert close(plain(**inputs).logits, model(**inputs).logits, 1e-5)


def llama(layers: int, width: int, inner: int) -> list[Site]:
    shapes = [(width, width)] * 4 + [(width, inner)] * 2 + [(inner, width)]
    return [site(f"{n}.{m}", *shape) for n in range(layers) for m, shape in enumerate(shapes)]


@pytest.mark.parametrize(
    ("r", "sites", "numbers"),
    [  # the paper's table for RoBERTa; its 1.6M and 2.4M for Llama-2
        (1024, [site(str(n), 768, 768) for n in range(24)], 43_008),
        (256, [site(str(n), 1024, 1024) for n in range(48)], 61_440),
        (1024, llama(32, 4096, 11008), 1_589_248),
        (1024, llama(40, 5120, 13824), 2_416_640),
    ],
)
def test_counts_are_the_papers(r: int, sites: list[Site], numbers: int) -> None:
    assert VeRA(r=r).count(sites) == numbers


@pytest.mark.parametrize("options", [{"r": 0}, {"d_initial": 0.0}, {"d_initial": float("nan")}])
def test_settings_that_cannot_train_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        VeRA(**options)  # type: ignore[arg-type]


def test_no_generator_decides_the_start() -> None:
    method, gen = VeRA(r=3), Streams([generator(1)])
    before = gen.state()
    theta, constants = start(method)
    again = method.init(SITES, constants, 2, generator(99))
    assert not tree.first_difference(theta, again)
    assert torch.equal(gen.state(), before)


def test_the_vectors_learn_faster_than_the_head() -> None:
    method = VeRA(r=3)
    theta = method.init(SITES, {}, 1, generator(1)) | {"classifier/weight": torch.zeros(1, 2, 3)}
    found = parametrise.rates(method, theta)
    assert set(found) == set(theta) - {"classifier/weight"}
    assert set(found.values()) == {20.0}
