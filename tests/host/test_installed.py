"""Installed stacks in training: checkpointing, autocast, dropout, factors differentiated in two stages."""

from __future__ import annotations

import pytest
import torch

from kilobayes import host, tree
from kilobayes.adapters import LoRA

from .tiny import batch, close, gradients, hosted, loop, repeated, scores

# The name that every supported transformers knows, and 5.23 calls old.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")

S = 2


def leaves(model) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone().requires_grad_() for k, v in host.read(model).items()}


def backward(logits: torch.Tensor) -> None:
    (logits.float() * torch.randn(logits.shape, generator=torch.Generator().manual_seed(8))).sum().backward()


def grads(theta) -> dict[str, torch.Tensor]:
    return {k: v.grad for k, v in theta.items()}


def still(model):
    """Training mode, which checkpointing asks for, without the base's own dropout."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["bert", "deberta", "gpt2", "llama", "modernbert"])
def test_checkpointing_gives_the_same_gradients(kind, reentrant):
    inputs = batch(kind)
    for outer in (False, True):
        found = []
        for checkpointed in (False, True):
            model = still(hosted(kind, stack=S))
            if checkpointed:
                base = model.get_base_model()
                base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
                base.enable_input_require_grads()
            theta, calls = leaves(model), []
            host.install(model, host.build(model, theta))
            layer = list(host.layers(model).values())[-1]
            layer.base_layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            if outer:
                with host.outer(model, S):
                    logits = scores(model(**inputs))
                    once = len(calls)
                    backward(logits)
            else:
                logits = scores(model(**repeated(inputs, S)))
                once = len(calls)
                backward(logits)
            assert len(calls) == (2 * once if checkpointed else once)
            found.append(grads(theta))
        for key, gradient in found[0].items():
            close(found[1][key], gradient, 1e-6)
            assert gradient.abs().max() > 0, key


def test_checkpointed_parameters_get_the_same_gradients_as_installed_ones():
    model, inputs = still(hosted("bert", stack=S)), repeated(batch("bert"), S)
    expected = gradients(model, model(**inputs).logits)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for key, gradient in gradients(model, model(**inputs).logits).items():
        close(gradient, expected[key], 1e-6)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_two_stages_of_the_backward_are_one(kind):
    """Detached operators collect the gradients of two passes; one backward takes them to theta."""
    model, passes = hosted(kind, stack=S), [batch(kind, seed=seed) for seed in (1, 2)]
    direct, staged = leaves(model), leaves(model)
    for inputs in passes:
        host.install(model, host.build(model, direct))
        backward(scores(model(**repeated(inputs, S))))
    built = host.build(model, staged)
    detached = host.detach(built)
    host.install(model, detached)
    for inputs in passes:
        backward(scores(model(**repeated(inputs, S))))
    assert all(v.grad is None for v in staged.values())
    roots, gradients_ = [], []
    for path, operator in built.items():
        for name, root in vars(operator).items():
            if root is not None:
                roots.append(root)
                gradients_.append(getattr(detached[path], name).grad)
    torch.autograd.backward(roots, gradients_)
    for key in direct:
        close(staged[key].grad, direct[key].grad, 1e-6)


def test_installed_operators_stay_until_removed():
    model, inputs = hosted("roberta", stack=S), repeated(batch("roberta"), S)
    before, theta = model(**inputs).logits, tree.map_params(lambda t: 1.5 * t.detach(), host.read(model))
    host.install(model, host.build(model, theta))
    inside = model(**inputs).logits
    assert torch.equal(model(**inputs).logits, inside)
    with model.disable_adapter():
        assert not torch.equal(model(**inputs).logits, inside)
    host.install(model, None)
    assert torch.equal(model(**inputs).logits, before)
    host.write(model, theta)
    assert torch.equal(model(**inputs).logits, inside)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama_lm", "deberta"])
def test_autocast_stays_near_full_precision(kind):
    model, inputs = hosted(kind, stack=S), batch(kind)
    expected = loop(model, inputs, S)
    with torch.autocast("cpu", torch.bfloat16), host.outer(model, S):
        logits = scores(model(**inputs))
    close(logits.float(), expected, 0.06)
    for key, gradient in gradients(model, logits.float()).items():
        assert gradient.dtype == torch.float32
        assert torch.isfinite(gradient).all(), key


def test_dropout_is_a_mask_on_columns_in_training_only():
    model, inputs = hosted("bert", stack=S, adapter=LoRA(r=4, dropout=0.5)), repeated(batch("bert"), S)
    layer = next(iter(host.layers(model).values()))
    a = layer.kilobayes_leaves["default"]["A"].detach()
    torch.manual_seed(0)
    dropped = layer.operator("default", dropout=True).A.detach()
    kept = (dropped != 0).all(dim=1)
    assert torch.equal(kept, (dropped != 0).any(dim=1))
    assert 0 < kept.sum() < kept.numel()
    assert not torch.equal(kept[0], kept[1])
    close(dropped, 2.0 * a * kept[:, None])
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)
    still(model)
    torch.manual_seed(1)
    first = model(**inputs).logits
    assert not torch.equal(model(**inputs).logits, first)
    torch.manual_seed(1)
    assert torch.equal(model(**inputs).logits, first)


def test_dropout_is_replayed_by_checkpointing():
    model, inputs = still(hosted("bert", adapter=LoRA(r=4, dropout=0.5))), batch("bert")
    torch.manual_seed(2)
    expected = gradients(model, model(**inputs).logits)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(2)
    for key, gradient in gradients(model, model(**inputs).logits).items():
        close(gradient, expected[key], 1e-6)


def test_merging_ignores_dropout():
    model, inputs = hosted("bert", adapter=LoRA(r=4, dropout=0.9)), batch("bert")
    expected = model(**inputs).logits
    model.train()
    model.merge_adapter()
    close(model.eval()(**inputs).logits, expected)


@pytest.mark.parametrize("pack", ["0", "1"])
def test_packed_weights_change_nothing(pack, monkeypatch):
    monkeypatch.setenv("KILOBAYES_PACK", pack)
    model, inputs = hosted("bert", stack=S), batch("bert")
    expected = loop(model, inputs, S)
    with host.packed(model), host.outer(model, S):
        logits = model(**inputs).logits
    close(logits, expected)
    theirs = gradients(model, expected)
    for key, gradient in gradients(model, logits).items():
        close(gradient, theirs[key])
