"""HydraLoRA against loops over its heads, LoRA where it must be LoRA, and the refusal to merge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kilobayes import tree
from kilobayes.adapters import HydraLoRA, LoRA
from kilobayes.adapters.hydralora import Routed, with_mean_gate
from kilobayes.random import Streams, generator
from kilobayes.testing.tiny import perturbed
from kilobayes.types import LowRank, Params, Site, map_tensors


def site(d_in: int, d_out: int, name: str = "a") -> Site:
    return Site(name, d_in, d_out, lambda: torch.empty(d_out, d_in, device="meta"))


AT = site(7, 5)


def leaves(method: HydraLoRA, stack: int = 2, at: Site = AT) -> Params:
    """Leaves of one site at a point where nothing is zero, without the site."""
    start = method.init([at], {}, stack, generator(3))
    return {k.removeprefix("a/"): v for k, v in perturbed(start, size=0.7).items()}


def looped(method: HydraLoRA, theta: Params, x: np.ndarray) -> np.ndarray:
    """The paper's sum, member by member, row by row, head by head."""
    a, b, router = (theta[k].double().numpy() for k in ("A", "B", "router"))
    scale = (2 * method.r if method.alpha is None else method.alpha) / method.r
    out = np.zeros((*x.shape[:2], b.shape[1]))
    for s in range(x.shape[0]):
        for n in range(x.shape[1]):
            low = a[s] @ x[s, n]
            scored = np.exp(router[s] @ (x[s, n] if method.router == "input" else low))
            gates = scored / scored.sum()
            for i in range(method.heads):
                head = b[s][:, i * method.r : (i + 1) * method.r]
                out[s, n] += scale * gates[i] * (head @ low)
    return out


@pytest.mark.parametrize("router", ["input", "rank"])
@pytest.mark.parametrize(("r", "heads", "alpha"), [(2, 3, None), (3, 2, 5.0), (1, 5, 1.0)])
def test_stacked_form_is_the_loop(router: str, r: int, heads: int, alpha: float | None) -> None:
    method = HydraLoRA(r=r, heads=heads, alpha=alpha, router=router)
    theta = leaves(method)
    x = torch.randn(2, 6, 7, generator=generator(1))
    operator = method.build(theta, {}, AT)
    np.testing.assert_allclose(
        operator(x).numpy(), looped(method, theta, x.double().numpy()), rtol=1e-5, atol=1e-5
    )
    assert isinstance(operator, Routed)
    gates = operator.gates(x)
    torch.testing.assert_close(gates.sum(dim=-1), torch.ones(2, 6))
    assert gates.shape == (2, 6, heads)
    assert bool((gates > 0).all())


def test_gates_are_float32_on_a_half_precision_base() -> None:
    method = HydraLoRA(r=2)
    half = map_tensors(method.build(leaves(method), {}, AT), Tensor.bfloat16)
    x = torch.randn(2, 4, 7, generator=generator(1)).bfloat16()
    assert half.gates(x).dtype == torch.float32
    torch.testing.assert_close(half.gates(x).sum(dim=-1), torch.ones(2, 4))
    assert half(x).dtype == torch.bfloat16


def test_one_head_is_lora() -> None:
    hydra, lora = HydraLoRA(r=2, heads=1, alpha=3.0), LoRA(r=2, alpha=3.0)
    theta, same = (m.init([AT], {}, 2, generator(8)) for m in (hydra, lora))
    assert not tree.first_difference(theta, same)
    assert hydra.count([AT]) == lora.count([AT])
    operator = hydra.build(tree.leaves_of(theta, "a"), {}, AT)
    assert isinstance(operator, LowRank)
    # the routed form with a single head, whatever its router
    a, b = (torch.randn(2, *shape, generator=generator(2)) for shape in ((2, 7), (5, 2)))
    x = torch.randn(2, 6, 7, generator=generator(1))
    single = Routed(torch.cat([a, torch.randn(2, 1, 7, generator=generator(4))], dim=1), b, None, 1)
    torch.testing.assert_close(single(x), LowRank(a, b)(x))


@pytest.mark.parametrize("router", ["input", "rank"])
def test_a_router_of_zeros_is_lora_with_the_mean_head(router: str) -> None:
    method = HydraLoRA(r=2, heads=4, router=router)
    theta = leaves(method)
    theta["router"] = torch.zeros_like(theta["router"])
    x = torch.randn(2, 6, 7, generator=generator(1))
    mean = theta["B"].reshape(2, 5, 4, 2).mean(dim=2)
    wanted = LoRA(r=2).build({"A": theta["A"], "B": mean}, {}, AT)(x)
    torch.testing.assert_close(method.build(theta, {}, AT)(x), wanted)
    lora, plain = with_mean_gate(method, {f"a/{k}": v for k, v in theta.items()})
    assert lora == LoRA(r=2)
    torch.testing.assert_close(lora.build(tree.leaves_of(plain, "a"), {}, AT)(x), wanted)


def test_a_decided_router_takes_one_head() -> None:
    method = HydraLoRA(r=2, heads=3)
    theta = leaves(method)
    direction = torch.randn(7, generator=generator(5))
    theta["router"] = torch.stack([-direction, direction, 0 * direction]).expand(2, 3, 7) * 1e4
    x = direction + 0.1 * torch.randn(2, 6, 7, generator=generator(1))
    wanted = LoRA(r=2).build({"A": theta["A"], "B": theta["B"][:, :, 2:4]}, {}, AT)(x)
    torch.testing.assert_close(method.build(theta, {}, AT)(x), wanted)


def model_sites(layers: int, shapes: list[tuple[int, int]]) -> list[Site]:
    return [site(d_in, d_out, f"{i}.{j}") for i in range(layers) for j, (d_in, d_out) in enumerate(shapes)]


BASE, LARGE = model_sites(12, [(768, 768)] * 2), model_sites(24, [(1024, 1024)] * 2)
LLAMA7 = model_sites(32, [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)])
LLAMA13 = model_sites(40, [(5120, 5120)] * 4 + [(5120, 13824)] * 2 + [(13824, 5120)])


@pytest.mark.parametrize(
    ("sites", "size"), [(BASE, 2_580_480), (LARGE, 6_881_280), (LLAMA7, 180_649_984), (LLAMA13, 282_869_760)]
)
def test_bytes_of_known_models(sites: list[Site], size: int) -> None:
    """Query and value of RoBERTa, all linear layers of Llama-2."""
    assert 4 * HydraLoRA().count(sites) == size


def test_the_papers_share_of_parameters_has_the_small_router() -> None:
    """0.124% of LLaMA2-7B at r = 8 and N = 3: query and value, and a router of r x N, or none."""
    sites = model_sites(32, [(4096, 4096)] * 2)
    share = {router: HydraLoRA(router=router).count(sites) / 6_738_415_616 for router in ("rank", "input")}
    assert f"{share['rank']:.4%}" == "0.1245%"
    assert f"{share['input']:.4%}" == "0.1362%"


def test_starts_at_the_base_and_counts_what_it_holds() -> None:
    for method in (HydraLoRA(r=2), HydraLoRA(r=2, heads=5, router="rank")):
        theta = method.init([AT, site(3, 9, "b")], {}, 2, generator(0))
        assert not theta["a/B"].any()
        bound = 7**-0.5
        assert 0.5 * bound < float(theta["a/A"].abs().max()) <= bound
        assert tree.numbers(theta) == method.count([AT, site(3, 9, "b")])
        assert not method.build(tree.leaves_of(theta, "a"), {}, AT)(torch.ones(2, 3, 7)).any()


def test_dropout_is_one_mask_for_all_heads_and_none_for_the_router() -> None:
    method = HydraLoRA(r=2, dropout=0.5)
    theta = method.init([AT], {}, 2, generator(0))
    dropped = method.drop(theta, Streams([generator(1), generator(2)]))
    gone = (dropped["a/A"] == 0).all(dim=1)
    assert 0 < int(gone.sum()) < gone.numel()
    torch.testing.assert_close(dropped["a/A"], theta["a/A"] * (2.0 * ~gone)[:, None])
    assert torch.equal(dropped["a/router"], theta["a/router"])
    assert torch.equal(dropped["a/B"], theta["a/B"])


def test_gates_given_by_hand_choose_heads() -> None:
    method = HydraLoRA(r=2, heads=3)
    theta = {f"a/{k}": v for k, v in leaves(method).items()} | {"head/weight": torch.ones(2, 3, 5)}
    gates = {"a": torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])}
    _, plain = with_mean_gate(method, theta, gates)
    assert torch.equal(plain["a/B"][0], theta["a/B"][0, :, 4:6])
    assert torch.equal(plain["a/B"][1], theta["a/B"][1, :, :2])
    assert set(plain) == {"a/A", "a/B", "head/weight"}


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="heads must be at least 1, found 0"):
        HydraLoRA(heads=0)
    with pytest.raises(ValueError, match="router must be input or rank, found 'text'"):
        HydraLoRA(router="text")
    with pytest.raises(ValueError, match="r must be at least 1, found 0"):
        HydraLoRA(r=0)
    with pytest.raises(ValueError, match="dropout must lie in"):
        HydraLoRA(dropout=1.0)
