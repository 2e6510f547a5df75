"""Starting, reading, writing, copying and installing stacks."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model

from kilobayes import host, tree
from kilobayes.errors import KilobayesError

from .tiny import batch, close, config, hosted, make, same


def test_members_start_where_they_would_alone():
    stacked = get_peft_model(make("bert"), config("bert", stack=3, seed=7, init_weights=True))
    for member in range(3):
        alone = get_peft_model(make("bert"), config("bert", seed=7 + member, init_weights=True))
        same(tree.clone(tree.member(host.read(stacked), member)), tree.clone(host.read(alone)))


def test_copies_are_independent_and_carry_nothing_installed():
    model, inputs = hosted("deberta"), batch("deberta")
    before = model(**inputs).logits
    theta = {k: v.detach() * 2 for k, v in host.read(model).items()}
    host.install(model, host.build(model, {k: v.requires_grad_() for k, v in theta.items()}))
    clone = copy.deepcopy(model)
    assert torch.equal(clone(**inputs).logits, before)
    assert not torch.equal(model(**inputs).logits, before)
    host.write(clone, theta)
    host.install(model, None)
    assert torch.equal(model(**inputs).logits, before)


def test_writing_keeps_parameters_of_the_same_shape_and_checks_the_rest():
    model = hosted("bert", stack=2)
    theta = tree.clone(host.read(model))
    held = host.read(model)
    host.write(model, {k: v + 1 for k, v in theta.items()})
    assert all(value is held[key] for key, value in host.read(model).items())
    close(next(iter(held.values())), next(iter(theta.values())) + 1)
    with pytest.raises(KilobayesError, match="only on one side: classifier/bias"):
        host.write(model, {k: v for k, v in theta.items() if k != "classifier/bias"})
    with pytest.raises(KilobayesError, match="another shape"):
        host.write(model, theta | {"classifier/bias": torch.zeros(3, 3)})
    host.write(model, tree.member(theta, slice(0, 1)))
    assert model.peft_config["default"].stack == tree.size(host.read(model)) == 1
    assert all(p.requires_grad for p in host.read(model).values())


def test_models_without_an_adapter_are_named():
    with pytest.raises(KilobayesError, match="no kilobayes adapter"):
        host.read(make("bert"))


def test_nothing_is_installed_on_merged_weights():
    model = hosted("bert")
    model.merge_adapter()
    with pytest.raises(KilobayesError, match="unmerge_adapter"):
        host.install(model, host.build(model, host.read(model)))


def test_a_factor_that_members_share_is_cast_once():
    from kilobayes.host.rows import _as

    shared = torch.randn(1, 3, 4).expand(5, 3, 4)
    narrow = _as(shared, torch.bfloat16)
    assert narrow.stride(0) == 0
    assert torch.equal(narrow, shared.to(torch.bfloat16))
    assert _as(torch.arange(3), torch.bfloat16).dtype == torch.int64
