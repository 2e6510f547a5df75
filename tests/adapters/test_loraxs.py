"""LoRA-XS against NumPy's singular vectors, and what the published code does wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from kilobayes import host, parametrise, tree
from kilobayes.adapters import LoRAXS, loraxs
from kilobayes.adapters.loraxs import leading
from kilobayes.errors import KilobayesError
from kilobayes.random import generator
from kilobayes.testing.tiny import TinyRows, close, perturbed, tiny_base, tiny_model, tiny_start
from kilobayes.types import Params, Site, delta

SHAPES = [(9, 6), (6, 9), (8, 8), (2, 7), (7, 2), (330, 400), (400, 330)]  # the last two by Krylov iteration
INPUTS, _ = TinyRows.make(8).batch(torch.arange(8))


def weight(shape: tuple[int, int]) -> Tensor:
    """Singular values as those of trained layers: a few large ones over a slowly falling rest."""
    w = torch.randn(shape, generator=generator(*shape))
    u, _, v = torch.linalg.svd(w, full_matrices=False)
    return u * (10.0 * torch.arange(1, min(shape) + 1) ** -0.5) @ v


def site(name: str, d_in: int, d_out: int, value: Tensor | None = None) -> Site:
    return Site(
        name, d_in, d_out, lambda: torch.empty(d_out, d_in, device="meta") if value is None else value
    )


def exact(w: Tensor, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    u, s, vt = np.linalg.svd(w.double().numpy(), full_matrices=False)
    u, s, v = u[:, :k], s[:k], vt[:k].T
    signs = np.sign(u[np.abs(u).argmax(axis=0), np.arange(u.shape[1])])
    return u * signs, s, v * signs


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_leading_singular_vectors_are_the_exact_ones(shape: tuple[int, int], dtype: torch.dtype) -> None:
    w = weight(shape).to(dtype)
    before = torch.random.get_rng_state()
    found = leading(w, 4)
    assert torch.equal(torch.random.get_rng_state(), before)
    for mine, wanted in zip(found, exact(w, min(4, *shape)), strict=True):
        assert mine.dtype == torch.float64
        np.testing.assert_allclose(mine.numpy(), wanted, atol=1e-6, rtol=1e-6)
    for mine, again in zip(found, leading(w.clone(), 4), strict=True):
        assert torch.equal(mine, again)
    assert (found[0].gather(0, found[0].abs().argmax(dim=0, keepdim=True)) > 0).all()


def test_iteration_that_does_not_converge_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix of noise, whose singular values lie close, with no more than one pass."""
    w = torch.randn(500, 400, generator=generator(8))
    passes = []

    def counted(m: Tensor, block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        passes.append(len(block))
        return krylov(m, block)

    krylov = loraxs._krylov
    monkeypatch.setattr(loraxs, "_krylov", counted)
    for limit in (loraxs.RESTARTS, 1, 0):
        monkeypatch.setattr(loraxs, "RESTARTS", limit)
        passes.clear()
        found = leading(w, 10)
        for mine, wanted in zip(found, exact(w, 10), strict=True):
            np.testing.assert_allclose(mine.numpy(), wanted, atol=2e-6)
        assert 1 < len(passes) < limit if limit > 1 else len(passes) == limit


@pytest.mark.parametrize("shape", [(400, 330), (12, 10)])
def test_weights_of_low_rank(shape: tuple[int, int]) -> None:
    """What lies beyond the rank is orthonormal all the same, and has singular values of zero."""
    gen = generator(3)
    w = torch.randn(shape[0], 3, generator=gen) @ torch.randn(3, shape[1], generator=gen)
    for value, rank in ((w, 3), (torch.zeros(shape), 0)):
        u, s, v = leading(value, 6)
        assert (s[rank:].abs() <= 1e-5 * max(float(s[0]), 1.0)).all()
        for side in (u, v):
            torch.testing.assert_close(side.mT @ side, torch.eye(6, dtype=torch.double), atol=1e-6, rtol=0.0)
        np.testing.assert_allclose((u * s @ v.mT).numpy(), value.numpy(), atol=1e-4)


@pytest.mark.parametrize("shape", [(12, 20), (330, 400)])
def test_vectors_do_not_depend_on_rounding_or_layout(shape: tuple[int, int]) -> None:
    """A stranger's arithmetic is ours plus noise; a transposed layout is another path through the code."""
    w = weight(shape).double()
    u, s, v = leading(w, 4)
    noise = 1e-13 * torch.randn(shape, generator=generator(2), dtype=torch.double)
    for mine, other in zip((u, s, v), leading(w + noise, 4), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-7, rtol=1e-7)
    right, same, left = leading(w.mT, 4)
    torch.testing.assert_close(s, same)
    torch.testing.assert_close(u * s @ v.mT, left * same @ right.mT, atol=1e-6, rtol=0.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_update_is_the_formula(shape: tuple[int, int]) -> None:
    w, method = weight(shape), LoRAXS(r=4, alpha=7.0)
    place = site("a", shape[1], shape[0], w)
    constants = method.freeze([place])
    k = min(4, *shape)
    assert {key: (value.dtype, *value.shape) for key, value in constants.items()} == {
        "a/U": (torch.float32, shape[0], k),
        "a/SV": (torch.float32, k, shape[1]),
    }
    theta = method.init([place], constants, 2, generator(1))
    assert {key: tuple(v.shape) for key, v in theta.items()} == {"a/R": (2, k, k)}
    assert method.count([place]) == k * k

    def update(r: Tensor) -> Tensor:
        operator = method.build({"R": r}, tree.leaves_of(constants, "a"), place)
        assert operator.A.data_ptr() == constants["a/SV"].data_ptr()  # one for all members
        return delta(operator, shape[1])

    u, s, v = exact(w, 4)
    one, other = torch.randn(2, 2, k, k, generator=generator(4))
    for member, found in enumerate(update(one)):
        expected = 7.0 / 4 * u @ one[member].double().numpy() @ np.diag(s) @ v.T
        np.testing.assert_allclose(found.numpy(), expected, atol=2e-5 * s[0])
        np.testing.assert_allclose(u @ (u.T @ found.numpy()), found.numpy(), atol=2e-5 * s[0])
    assert close(update(2.0 * one - other), 2.0 * update(one) - update(other), 1e-5)  # linear
    whole = update(4.0 / 7.0 * torch.eye(k)[None])[0].double().numpy()  # the best of rank k
    rest = np.linalg.svd(w.double().numpy(), compute_uv=False)[k:]
    assert np.linalg.norm(w.numpy() - whole) == pytest.approx(np.sqrt((rest**2).sum()), rel=1e-4, abs=1e-5)


def test_it_starts_next_to_the_base_model() -> None:
    places = [site(str(i), 64, 48, weight((48, 64))) for i in range(3)]
    method = LoRAXS()
    theta = method.init(places, {}, 50, generator(1))
    r = torch.cat([v.flatten() for v in theta.values()])
    assert float(r.std()) == pytest.approx(1e-5, rel=0.02)
    assert abs(float(r.mean())) < 5e-5 / len(r) ** 0.5
    assert len({float(v[m, 0, 0]) for v in theta.values() for m in range(50)}) == 150
    found = delta(
        method.build({"R": theta["0/R"]}, tree.leaves_of(method.freeze(places), "0"), places[0]), 64
    )
    ratio = found.flatten(1).norm(dim=1) / places[0].weight().norm()
    assert 1e-6 < float(ratio.min()) < float(ratio.max()) < 2e-4
    model, base = tiny_model(LoRAXS()), tiny_base()
    with torch.no_grad():
        hidden = [net(output_hidden_states=True, **INPUTS).hidden_states[-1] for net in (model, base)]
    assert close(*hidden, 1e-3)
    assert not torch.equal(*hidden)


def test_the_checkpoint_holds_the_small_matrices_alone(tmp_path: Path) -> None:
    """The published one holds both frozen factors of every layer as well."""
    method = LoRAXS(r=5, alpha=3.0)
    model = tiny_model(method)
    host.write(model, perturbed(tiny_start(model, [4]), size=0.3))
    model.save_pretrained(str(tmp_path))
    held = load_file(tmp_path / "adapter_model.safetensors")
    leaves = {k: v for k, v in held.items() if "kilobayes_leaves" in k}
    assert {tuple(v.shape) for v in leaves.values()} == {(1, 5, 5)}
    assert sum(v.numel() for v in leaves.values()) == method.count(host.sites(model))
    others = {k: v for k, v in held.items() if k not in leaves and "classifier" not in k}
    assert all(v.numel() == 1 for v in others.values())
    back = PeftModel.from_pretrained(tiny_base(), str(tmp_path)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.equal(back(**INPUTS).logits, model(**INPUTS).logits)
    with pytest.raises(KilobayesError, match="another base"):
        PeftModel.from_pretrained(tiny_base(seed=1), str(tmp_path))  # type: ignore[arg-type]


LLAMA = [((4096, 4096), 128), ((4096, 11008), 64), ((11008, 4096), 32)]
LARGE = [((1024, 1024), 72), ((4096, 1024), 24)]  # query, value and both outputs of RoBERTa-large


@pytest.mark.parametrize(
    ("r", "shapes", "numbers"),
    [  # the paper's counts, and Mistral's and Llama-3's
        (4, LARGE, 1_536),
        (8, LARGE, 6_144),
        (12, LARGE, 13_824),
        (16, LARGE, 24_576),
        (20, LARGE, 38_400),
        (25, LARGE, 60_000),
        (16, [((768, 768), 24)], 24_576 // 4),
        (16, [((1024, 1024), 48)], 49_152 // 4),
        (64, LLAMA, 3_670_016 // 4),
        (64, [((5120, 5120), 160), ((5120, 13824), 80), ((13824, 5120), 40)], 4_587_520 // 4),
        (128, LLAMA, 3_670_016),
    ],
)
def test_counts_are_the_papers(r: int, shapes: list[tuple[tuple[int, int], int]], numbers: int) -> None:
    sites = [site(f"{shape}{i}", *shape) for shape, times in shapes for i in range(times)]
    method = LoRAXS(r=r)
    assert method.count(sites) == numbers
    constants: Params = method.freeze(sites[:1])  # shapes alone: there are no weights
    assert {v.device.type for v in constants.values()} == {"meta"}
    assert tree.numbers(method.init(sites[:2], constants, 1, generator(0))) == 2 * r * r


def test_the_small_matrices_and_heads_have_learning_rates_of_their_own() -> None:
    theta = tiny_start(tiny_model(LoRAXS(r=2)), [1])
    factors = parametrise.rates(LoRAXS(r=2), theta)
    assert factors == {key: 8.0 if key.endswith("/R") else 4.0 for key in theta}


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="r must be at least 1"):
        LoRAXS(r=0)
