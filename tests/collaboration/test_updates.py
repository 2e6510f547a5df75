from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kilobayes import collaboration, gauge, host
from kilobayes.adapters import NOLA, HydraLoRA, LoRA, LoRAXS, MoRA, VBLoRA, VeRA
from kilobayes.collaboration import updates
from kilobayes.errors import KilobayesError
from kilobayes.testing.tiny import perturbed, tiny_model, tiny_start
from kilobayes.types import Params, delta

TRUST = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]])


def users(adapter: Any) -> tuple[Any, Params]:
    model = tiny_model(adapter)
    return model, perturbed(tiny_start(model, [1, 2, 3]), size=0.3)


def deltas(model: Any, theta: Params) -> dict[str, np.ndarray]:
    built = host.build(model, theta)
    return {s.name: delta(built[s.name], s.d_in).detach().double().numpy() for s in host.sites(model)}


def off(model: Any, theta: Params, mixed: Params) -> list[float]:
    """Relative distance to the average of full update matrices, by numpy."""
    each, found = deltas(model, theta), deltas(model, mixed)
    apart, whole = np.zeros(2), np.zeros(2)
    for site, matrices in each.items():
        exact = np.einsum("vu,uoi->voi", TRUST.double().numpy(), matrices)
        apart += ((found[site] - exact) ** 2).sum(axis=(1, 2))
        whole += (exact**2).sum(axis=(1, 2))
    return np.sqrt(apart / whole).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("adapter", [LoRAXS(r=3), MoRA(r=2), MoRA(r=2, kind="rotate")])
def test_linear_adapters_are_averaged_exactly_by_their_leaves(adapter: Any) -> None:
    model, theta = users(adapter)
    found = updates.average(model, theta, TRUST)
    assert found.how == "leaves"
    assert max(off(model, theta, found.theta)) < 1e-5
    assert float(found.lost.max()) < 1e-5
    key = next(k for k in theta if k.endswith(("/R", "/M")))
    torch.testing.assert_close(found.theta[key], torch.einsum("vu,u...->v...", TRUST, theta[key]))


def test_lora_is_averaged_by_its_updates() -> None:
    model, theta = users(LoRA(r=4))
    found = updates.average(model, theta, TRUST)
    assert found.how == "updates"
    np.testing.assert_allclose(found.lost, off(model, theta, found.theta), rtol=1e-4)
    plain = updates.average(model, theta, TRUST, how="leaves")
    assert bool((plain.lost > found.lost).all())
    np.testing.assert_allclose(plain.lost, off(model, theta, plain.theta), rtol=0.1)  # random inputs
    assert set(found.theta) == set(theta)
    head = next(k for k in theta if k.endswith("classifier/weight"))
    torch.testing.assert_close(found.theta[head], torch.einsum("vu,uci->vci", TRUST, theta[head]))


def test_users_of_one_function_keep_it_however_their_factors_are_turned() -> None:
    model, theta = users(LoRA(r=4))
    same = {k: v[:1].repeat(3, *[1] * (v.dim() - 1)) for k, v in theta.items()}
    turn = torch.linalg.qr(torch.randn(4, 4))[0]
    for key in list(same):
        if key.endswith("/A"):
            site = key[:-2]
            same[key][1], same[f"{site}/B"][1] = turn @ same[key][1], same[f"{site}/B"][1] @ turn.T
    found = updates.average(model, same, TRUST)
    assert max(off(model, same, found.theta)) < 1e-5
    assert min(off(model, same, updates.mix(same, TRUST))) > 0.1


@pytest.mark.parametrize("adapter", [VeRA(r=8), NOLA(r=2, k=6), VBLoRA(r=2, h=8, k=2)])
def test_products_are_refused_or_averaged_as_they_are(adapter: Any) -> None:
    model, theta = users(adapter)
    with pytest.raises(KilobayesError, match="not linear"):
        updates.average(model, theta, TRUST)
    found = updates.average(model, theta, TRUST, how="leaves")
    assert float(found.lost.min()) > 0.01  # and it says so
    assert {k: v.shape[0] for k, v in found.theta.items()} == dict.fromkeys(theta, 2)


def test_a_router_has_no_sum_of_updates() -> None:
    model, theta = users(HydraLoRA(r=2, heads=2))
    with pytest.raises(KilobayesError, match="low rank"):
        updates.factors(model, theta)
    assert updates.average(model, theta, TRUST, how="leaves").how == "leaves"
    with pytest.raises(KilobayesError, match="cannot average by 'sum'"):
        updates.average(model, theta, TRUST, how="sum")


def test_inner_products_over_all_sites() -> None:
    model, theta = users(LoRA(r=4))
    flat = np.concatenate([m.reshape(3, -1) for m in deltas(model, theta).values()], axis=1)
    np.testing.assert_allclose(updates.gram(model, theta), flat @ flat.T, rtol=1e-5)
    model, theta = users(MoRA(r=2))
    flat = np.concatenate([m.reshape(3, -1) for m in deltas(model, theta).values()], axis=1)
    found = collaboration.cosines_of(updates.gram(model, theta)).numpy()
    norms = np.linalg.norm(flat, axis=1)
    assert np.abs(found - flat @ flat.T / np.outer(norms, norms)).max() < 0.1
    assert gauge.HOW[0] == "updates"
