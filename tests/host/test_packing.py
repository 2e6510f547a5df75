"""Packed products against plain autograd, and a model that is untouched by the context."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from kilobayes.host import kernels
from kilobayes.host.packing import FrozenWeight, frozen_weights, packed, packed_weights

pytestmark = pytest.mark.skipif(
    not kernels.available(), reason="oneDNN's packed product is not in this build of torch"
)
ROWS = 256  # with these widths enough for the packed path


@pytest.fixture(autouse=True)
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILOBAYES_PACK", "1")


@pytest.fixture
def gen() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Relative to the largest entry: sums in another order lose digits where they cancel."""
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    assert (got - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1e-6)


def net(gen: torch.Generator, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A trained layer below, so that the frozen ones above (one a Conv1D) must pass gradients on."""
    model = nn.Sequential(
        nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 128), nn.Tanh(), Conv1D(96, 128), nn.Linear(96, 80)
    )
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=gen).mul(0.1).to(dtype)
        p.requires_grad_(False)
    model[5].bias = None
    model[0].requires_grad_(True)
    return model


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    return [
        y.detach(),
        *torch.autograd.grad(y.sin().sum(), [x, *(p for p in model.parameters() if p.requires_grad)]),
    ]


@pytest.mark.parametrize("shape", [(ROWS, 48), (8, 32, 48), (2, 4, 32, 48)])
def test_a_model_gives_the_same_outputs_and_gradients(shape: tuple[int, ...], gen: torch.Generator) -> None:
    model, x = net(gen), torch.randn(shape, generator=gen)
    plain = gradients(model, x)
    with packed(model) as same:
        assert same is model
        assert [name for name, m in model.named_modules() if "forward" in m.__dict__] == ["2", "4", "5"]
        for got, wanted in zip(gradients(model, x), plain, strict=True):
            close(got, wanted)
        with torch.no_grad():
            close(model(x), plain[0])
        with torch.inference_mode():
            close(model(x), plain[0])
        assert model(x[:0]).shape == plain[0][:0].shape


def test_the_packed_kernel_really_runs(gen: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    multiply = kernels.PackedWeight.multiply
    monkeypatch.setattr(
        kernels.PackedWeight, "multiply", lambda self, x: calls.append(len(self.values)) or multiply(self, x)
    )
    model, x = net(gen), torch.randn(ROWS, 48, generator=gen)
    with packed(model):
        gradients(model, x)
        assert calls == [128, 96, 80, 96, 128, 64]  # forward, then the transposes
        calls.clear()
        model(x[:2])
        assert calls == []  # too small to pay
    with packed(model, backward=False):
        gradients(model, x)
        assert calls == []
        with torch.no_grad():
            model(x)
        assert calls == [128, 96, 80]
    calls.clear()
    model(x)
    assert calls == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, gen: torch.Generator) -> None:
    model, x = net(gen), torch.randn(ROWS, 48, generator=gen)
    plain = gradients(model, x)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    whole = Checkpointed()
    with packed(model):
        for p in model.parameters():  # reentrant checkpointing forbids autograd.grad
            p.grad = None
        x.requires_grad_()
        y = whole(x)
        y.sin().sum().backward()
    got = [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    for one, wanted in zip(got, plain, strict=True):
        close(one, wanted)


def test_nothing_is_left_behind(gen: torch.Generator) -> None:
    model, x = net(gen), torch.randn(ROWS, 48, generator=gen)
    before = [dict(m.__dict__) for m in model.modules()]
    state = {k: (v.data_ptr(), v.clone()) for k, v in model.state_dict().items()}
    with packed(model, backward=False), packed(model):
        inside = model.state_dict()
        gradients(model, x)
    with pytest.raises(RuntimeError, match="stop"), packed(model):
        raise RuntimeError("stop")
    assert [dict(m.__dict__) for m in model.modules()] == before
    for values in (inside, model.state_dict()):
        assert all(v.data_ptr() == state[k][0] and torch.equal(v, state[k][1]) for k, v in values.items())


def test_nested_contexts_keep_the_outer_one(gen: torch.Generator) -> None:
    model = net(gen)
    with packed(model):
        outer = packed_weights(model[2])
        with packed(model):
            assert packed_weights(model[2]) is outer
        assert packed_weights(model[2]) is outer
    assert packed_weights(model[2]) is None


def test_changed_weights_are_not_served_from_the_old_pack(gen: torch.Generator) -> None:
    model, x = net(gen), torch.randn(ROWS, 48, generator=gen)
    with packed(model):
        with torch.no_grad():
            model[2].weight.mul_(2.0)  # in place
        model[4].weight.data = model[4].weight.data * 2.0  # as merging does
        model[5].weight.requires_grad_(True)  # trained from now on
        assert [packed_weights(model[i]) for i in (2, 4, 5)] == [None] * 3
        inside = gradients(model, x)
    for got, wanted in zip(inside, gradients(model, x), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_transforms_and_autocast_run_the_plain_code(gen: torch.Generator) -> None:
    model, x = net(gen), torch.randn(ROWS, 48, generator=gen)

    def measured() -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(x)
        per_row = torch.func.vmap(torch.func.grad(lambda row: model(row).sum()))(x)
        _, tangent = torch.func.jvp(model, (x,), (x,))
        return [cast, per_row, tangent]

    plain = measured()
    with packed(model):
        for got, wanted in zip(measured(), plain, strict=True):
            assert torch.equal(got, wanted)


def test_copies_made_inside_are_plain(gen: torch.Generator) -> None:
    model, x = net(gen), torch.randn(ROWS, 48, generator=gen)
    plain = model(x)
    with packed(model):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin[2].weight.zero_()
        assert packed_weights(twin[2]) is None
        assert not torch.equal(twin(x), plain)
        close(model(x), plain)


def test_what_is_not_a_plain_frozen_layer_is_left_alone(gen: torch.Generator) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    half, hooked, biased = nn.Linear(4, 4, dtype=torch.float16), nn.Linear(4, 4), nn.Linear(4, 4)
    hooked.forward = lambda x: x  # type: ignore[method-assign]
    model = nn.ModuleList(
        [Doubled(4, 4), half, hooked, biased, nn.Linear(4, 4, device="meta"), nn.Embedding(3, 4)]
    )
    model.requires_grad_(False)
    biased.bias.requires_grad_(True)
    with packed(model), packed(model, torch.float16), packed(model, torch.bfloat16):
        assert [i for i, m in enumerate(model) if "forward" in m.__dict__] == [2]
    assert hooked.forward(1) == 1


@pytest.mark.skipif(not kernels.available(torch.bfloat16), reason="no bfloat16 products here")
def test_bfloat16_when_asked_for(gen: torch.Generator) -> None:
    model, x = net(gen, torch.bfloat16), torch.randn(ROWS, 48, generator=gen).bfloat16()
    plain = gradients(model, x)
    with packed(model):
        assert packed_weights(model[2]) is None
    with packed(model, torch.bfloat16):
        assert packed_weights(model[2]) is not None
        for got, wanted in zip(gradients(model, x), plain, strict=True):
            close(got.float(), wanted.float(), 3e-2)


def test_frozen_weights_are_given_where_a_call_is_just_a_product(gen: torch.Generator) -> None:
    model, x = net(gen), torch.randn(ROWS, 128, generator=gen)
    trained, conv = model[0], model[4]
    assert frozen_weights(trained) is None
    assert frozen_weights(model[1]) is None
    base = frozen_weights(conv)
    assert type(base) is FrozenWeight
    assert torch.equal(base.product(x), conv(x))
    with packed(model):
        assert frozen_weights(conv) is packed_weights(conv)
    with torch.autocast("cpu", torch.bfloat16):
        assert frozen_weights(conv) is None
    handle = conv.register_forward_hook(lambda module, args, out: out + 1)
    assert frozen_weights(conv) is None
    with packed(model):
        assert frozen_weights(conv) is None
        close(conv(x), base.product(x) + 1)
    handle.remove()
    assert frozen_weights(conv) is not None
