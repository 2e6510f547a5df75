"""OLoRA against NumPy's decomposition and PEFT's OLoRA, and what PEFT's does wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from kilobayes import host, tree
from kilobayes.adapters import OLoRA
from kilobayes.adapters.olora import factors
from kilobayes.posteriors import Point
from kilobayes.random import generator
from kilobayes.testing.tiny import (
    TARGETS,
    TinyRows,
    close,
    perturbed,
    scores,
    tiny_base,
    tiny_model,
    tiny_start,
)
from kilobayes.types import Params, Progress, Site, delta

SHAPES = [(9, 6), (6, 9), (8, 8), (3, 7), (7, 3)]
INPUTS, LABELS = TinyRows.make(8).batch(torch.arange(8))


def weight(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, generator=generator(*shape))


def site(name: str, d_in: int, d_out: int, value: Tensor | None = None) -> Site:
    return Site(
        name, d_in, d_out, lambda: torch.empty(d_out, d_in, device="meta") if value is None else value
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_are_the_leading_part_of_the_decomposition_of_all_of_the_weight(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    w = weight(shape).to(dtype)
    q, r = np.linalg.qr(w.double().numpy())
    k = min(4, *shape)
    signs = np.sign(np.diag(r))[:k]
    ours = factors(w, 4)
    assert [t.dtype for t in ours] == [torch.float32] * 2
    np.testing.assert_allclose(ours[0].numpy(), q[:, :k] * signs, atol=1e-6)
    np.testing.assert_allclose(ours[1].numpy(), signs[:, None] * r[:k], atol=1e-6)
    assert not np.tril(ours[1].numpy(), -1).any()  # upper trapezoidal
    assert (ours[1].diagonal() > 0).all()
    np.testing.assert_allclose((ours[0].mT @ ours[0]).numpy(), np.eye(k), atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_update_is_the_formula(shape: tuple[int, int]) -> None:
    w, method = weight(shape), OLoRA(r=4, alpha=7.0)
    place = site("a", shape[1], shape[0], w)
    constants = method.freeze([place])
    theta = method.init([place], constants, 2, generator(1))
    assert sum(v[0].numel() for v in theta.values()) == method.count([place])
    q, start = (constants[f"a/{name}"].double().numpy() for name in ("Q", "A0"))

    def update(theta: Params) -> Tensor:
        return delta(
            method.build(tree.leaves_of(theta, "a"), tree.leaves_of(constants, "a"), place), shape[1]
        )

    assert torch.equal(update(theta), torch.zeros(2, *shape))  # whatever the scale, to the last bit
    moved = perturbed(theta, size=0.5)
    found = update(moved)
    for member in range(2):
        a, d = (moved[f"a/{name}"][member].double().numpy() for name in ("A", "D"))
        expected = 7.0 / 4 * ((q + d) @ (start + a) - q @ start)
        np.testing.assert_allclose(found[member].numpy(), expected, atol=1e-5)
    # without its factors, the published residual: its first r columns are (1 - s) W
    gone = {"a/A": -constants["a/A0"][None], "a/D": -constants["a/Q"][None]}
    k = min(4, *shape)
    torch.testing.assert_close((w + update(gone)[0])[:, :k], (1 - 7.0 / 4) * w[:, :k], atol=1e-5, rtol=0.0)


def theirs(dtype: torch.dtype = torch.float32) -> Any:
    config = LoraConfig(
        r=3, lora_alpha=5, init_lora_weights="olora", target_modules=TARGETS, exclude_modules=["pooler.dense"]
    )
    base: Any = tiny_base().to(dtype)
    return get_peft_model(base, config).eval()


def ours(dtype: torch.dtype = torch.float32) -> PeftModel:
    return tiny_model(OLoRA(r=3, alpha=5.0), base=tiny_base().to(dtype)).eval()


def displaced(model: Any, peft: Any) -> Params:
    """PEFT's factors as leaves of ours: their signs may differ, their product does not."""
    theta: Params = {k: v.detach().clone() for k, v in host.read(model).items()}
    for name, layer in host.layers(model).items():
        other, constants = peft.get_base_model().get_submodule(name), layer.constants["default"]
        q, start = other.first
        signs = (q * constants["Q"]).sum(dim=0).sign()
        torch.testing.assert_close(q * signs, constants["Q"], atol=1e-5, rtol=0.0)
        torch.testing.assert_close(signs[:, None] * start, constants["A0"], atol=1e-5, rtol=0.0)
        a, b = other.lora_A["default"].weight.detach(), other.lora_B["default"].weight.detach()
        theta[f"{name}/A"] = (signs[:, None] * a - constants["A0"])[None]
        theta[f"{name}/D"] = (b * signs - constants["Q"])[None]
    return theta


def remember(peft: Any) -> Any:
    for module in peft.modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            first = module.lora_B["default"].weight, module.lora_A["default"].weight
            module.first = tuple(t.detach().clone() for t in first)
    return peft


def test_the_same_weights_as_pefts_give_the_same_outputs() -> None:
    model, peft = ours(), remember(theirs())
    gen = generator(3)
    with torch.no_grad():
        for name, value in peft.named_parameters():
            if "lora_" in name:
                value += 0.1 * torch.randn(value.shape, generator=gen)
        theta = displaced(model, peft)
        assert all(float(v.abs().max()) > 0.1 for k, v in theta.items() if "classifier" not in k)
        host.write(model, theta)
    assert close(_hidden(model), _hidden(peft), 1e-5)
    assert not close(_hidden(model), _hidden(tiny_base()), 0.05)


def test_the_same_steps_as_pefts() -> None:
    """Four steps of Adam without weight decay, heads frozen: the paths are one."""
    model, peft = ours(), remember(theirs())
    for name, value in host.read(model).items():
        value.requires_grad_("classifier" not in name)
    rate = 3e-3
    paths = []
    for net in (model, peft):
        head = tiny_base().classifier  # one head for both, untrained
        trained = [p for n, p in net.named_parameters() if p.requires_grad and "classifier" not in n]
        adam = torch.optim.Adam(trained, lr=rate)
        for _ in range(4):
            adam.zero_grad()
            logits = head(_last(net)[:, 0])
            torch.nn.functional.cross_entropy(logits, LABELS).backward()
            adam.step()
        paths.append(_hidden(net))
    assert close(paths[0], paths[1], 2e-4)
    assert not close(paths[0], _hidden(tiny_base()), 0.02)


def _last(net: Any) -> Tensor:
    return net(output_hidden_states=True, **INPUTS).hidden_states[-1]


_hidden = torch.no_grad()(_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_at_the_base_and_is_switched_off_to_the_base(dtype: torch.dtype) -> None:
    """Bit for bit; PEFT's has rounded the base's weights, and its base is another when it is off."""
    model, base = ours(dtype), tiny_base().to(dtype)
    expected = base(**INPUTS).logits.detach()
    assert torch.equal(_hidden(model), _hidden(base))
    host.write(model, perturbed(tiny_start(model, [4])))
    assert not close(model(**INPUTS).logits.detach(), expected, 0.05)
    with model.disable_adapter():
        assert torch.equal(model(**INPUTS).logits, expected)
    assert torch.equal(model.unload()(**INPUTS).logits, expected)
    peft = theirs(dtype)
    assert not torch.equal(_hidden(peft), _hidden(base))
    with peft.disable_adapter():
        assert not close(_hidden(peft).float(), _hidden(base).float(), 0.1)


def test_small_updates_survive_half_precision() -> None:
    """The difference of two products of size |W| would drown them."""
    w = weight((64, 48))
    method, place = OLoRA(r=8), site("a", 48, 64, w)
    constants = tree.leaves_of(method.freeze([place]), "a")
    leaves = tree.leaves_of(perturbed(method.init([place], {}, 1, generator(1)), size=1e-3), "a")
    x = torch.randn(1, 40, 48, generator=generator(2))
    exact = method.build(leaves, constants, place)(x)

    def rounded(a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(torch.bmm(x.bfloat16(), a.bfloat16().mT), b.bfloat16().mT).float()

    built = method.build(leaves, constants, place)
    q, start = constants["Q"][None], constants["A0"][None]
    naive = rounded(start + leaves["A"], q + leaves["D"]) - rounded(start, q)
    error = [float((found - exact).norm() / exact.norm()) for found in (rounded(built.A, built.B), naive)]
    assert error[0] < 0.02
    assert error[1] > 0.2


def test_a_prior_around_the_start_and_one_around_zero_are_around_the_base() -> None:
    model, rows = ours(), TinyRows.make(12)
    theta = tiny_start(model, [4, 5])
    method = Point(prior_precision=1e4)
    state = method.init(theta, generator(1))
    leaves = {k: v.clone().requires_grad_() for k, v in theta.items()}
    progress = Progress(1, 1, 1, 12)
    loss = method.penalty(state, leaves, progress)
    assert loss.tolist() == [0.0, 0.0]
    loss.sum().backward()
    assert all(v.grad is not None and not v.grad.any() for v in leaves.values())
    head = {k: v for k, v in theta.items() if k.startswith("classifier")}
    assert not any(v.any() for k, v in theta.items() if k not in head)  # the base is where all is zero
    start = scores(model, theta, rows)
    # so what pulls to zero, as weight decay does, leads to the base; PEFT's loses a part of the weights
    away = perturbed(theta, size=0.01) | head
    before = float((scores(model, away, rows) - start).abs().max())
    decayed = tree.map_params(lambda v: 0.05 * v, away) | head
    assert 0.0 < float((scores(model, decayed, rows) - start).abs().max()) < 0.1 * before
    peft = remember(theirs())
    whole = _hidden(peft)
    for name, value in peft.named_parameters():
        if "lora_" in name:
            value.data *= 0.95
    assert not close(_hidden(peft), whole, 0.01)


@pytest.mark.parametrize(
    ("r", "shapes", "size"),
    [  # bytes in float32
        (8, [(768, 768)] * 24, 1_179_648),
        (8, [(1024, 1024)] * 48, 3_145_728),
        (64, [(4096, 4096)] * 128 + [(4096, 11008)] * 64 + [(11008, 4096)] * 32, 639_631_360),
        (64, [(5120, 5120)] * 160 + [(5120, 13824)] * 80 + [(13824, 5120)] * 40, 1_001_390_080),
    ],
)
def test_sizes(r: int, shapes: list[tuple[int, int]], size: int) -> None:
    assert 4 * OLoRA(r=r).count([site(str(i), *shape) for i, shape in enumerate(shapes)]) == size


def test_a_base_without_weights_gives_shapes() -> None:
    constants = OLoRA(r=3).freeze([site("a", 5, 7), site("b", 2, 7)])
    assert {v.device.type for v in constants.values()} == {"meta"}
    assert {k: tuple(v.shape) for k, v in constants.items()} == {
        "a/Q": (7, 3), "a/A0": (3, 5), "b/Q": (7, 2), "b/A0": (2, 2),
    }  # fmt: skip
    with pytest.raises(ValueError, match="r must be at least 1"):
        OLoRA(r=0)
