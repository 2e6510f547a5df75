"""What every adapter must do."""

from __future__ import annotations

import dataclasses
import tempfile
from typing import Any

import torch
from peft import PeftModel

from kilobayes import host, spec, tree
from kilobayes.catalog import catalog
from kilobayes.errors import KilobayesError
from kilobayes.random import Streams, generator
from kilobayes.testing.tiny import (
    TinyRows,
    close,
    expect,
    perturbed,
    scores,
    tiny_base,
    tiny_model,
    tiny_start,
)
from kilobayes.types import Adapter, Params


def check_configuration(method: Any, kind: str) -> None:
    """A frozen dataclass equal to its copy, and to what its specification is read as if it is ours."""
    name = type(method).__name__
    expect(dataclasses.is_dataclass(method), f"{name} is not a dataclass")
    expect(type(method).__dataclass_params__.frozen, f"{name} is not frozen")  # type: ignore[attr-defined]
    expect(dataclasses.replace(method) == method, f"{name} is not equal to a copy of itself")
    expect(hash(dataclasses.replace(method)) == hash(method), f"{name} and its copy have different hashes")
    if name in catalog(kind):
        for text in (spec.format(method), repr(method)):
            expect(spec.parse(text, kind) == method, f"{text} is read as {spec.parse(text, kind)!r}")


def check_adapter(adapter: Adapter, stack: int = 3) -> None:
    """What an adapter must do, alone and in a stack.

    Raises:
        AssertionError: what it does instead.
    """
    check_configuration(adapter, "adapters")
    model, rows = tiny_model(adapter), TinyRows.make(12)
    sites, seeds = host.sites(model), list(range(7, 7 + stack))
    theta, constants = host.initial(adapter, sites, seeds)
    places = {site.name for site in sites} | {"*"}
    for key, value in {**theta, **constants}.items():
        expect(tree.split_key(key)[0] in places, f"leaf {key} belongs to no site")
        expect(bool(torch.isfinite(value).all()), f"leaf {key} starts with a NaN or an infinity")
    for key, value in theta.items():
        expect(
            value.shape[0] == stack, f"leaf {key} {tuple(value.shape)} has no leading axis of {stack} members"
        )
        expect(value.dtype == torch.float32, f"leaf {key} starts as {value.dtype}, not float32")
    for index, seed in enumerate(seeds):
        alone, _ = host.initial(adapter, sites, [seed])
        odd = tree.first_difference(alone, tree.member(theta, index))
        expect(not odd, f"leaf {odd} of a member depends on the other members, or on global random numbers")
    if hasattr(adapter, "count"):
        found = tree.numbers(theta)
        expect(adapter.count(sites) == found, f"count says {adapter.count(sites)} numbers, there are {found}")
    _check_forward(adapter, model, rows, perturbed(tiny_start(model, seeds)))
    _check_dropout(adapter, theta)


def _check_forward(adapter: Adapter, model: PeftModel, rows: TinyRows, theta: Params) -> None:
    leaves = {k: v.requires_grad_() for k, v in theta.items()}
    before = tree.clone(leaves)
    together = scores(model, leaves, rows)
    expect(not tree.first_difference(before, leaves), "build changed its leaves in place")
    with torch.no_grad():
        for index in range(tree.size(theta)):
            alone = scores(model, tree.member(leaves, index), rows)[0]
            expect(
                close(together[index], alone), f"member {index} in a stack differs from the same member alone"
            )
    together.square().sum().backward()
    for key, leaf in leaves.items():
        gradient = leaf.grad
        expect(gradient is not None, f"leaf {key} gets no gradient")
        assert gradient is not None
        idle = (gradient.flatten(1).abs().amax(dim=1) == 0).nonzero()[:, 0].tolist()
        expect(not idle, f"leaf {key} of members {idle} gets a gradient of zero")
    for leaf in leaves.values():
        leaf.grad = None
    scores(model, leaves, rows)[0].sum().backward()
    leak = [k for k, v in leaves.items() if v.grad is not None and bool(v.grad[1:].abs().any())]
    expect(not leak, f"the first member's loss has a gradient in other members' {leak[:2]}")
    with torch.no_grad():
        one = tree.clone(tree.member(leaves, 0))
        check_merge(model, one, rows)
        check_reload(model, one)
        half = tiny_model(adapter, base=tiny_base().to(torch.bfloat16))
        out = scores(half, one, rows)
        expect(out.dtype == torch.bfloat16, f"on a bfloat16 base the scores are {out.dtype}")
        expect(
            all(v.dtype == torch.float32 for v in one.values()), "a bfloat16 base changed the leaves' dtype"
        )


def check_merge(model: PeftModel, theta: Params, rows: TinyRows) -> None:
    """Merged into the base's weights, one member gives the scores that it gives beside them.

    An adapter whose operators say that they are not linear must refuse instead, whatever its weights are.
    """
    beside = scores(model, theta, rows)
    host.write(model, theta)
    if any(getattr(operator, "nonlinear", "") for operator in host.build(model, theta).values()):
        expect(_refuses_to_merge(model), "it was merged, though it says that it is not linear")
        return
    inputs, _ = rows.batch(torch.arange(len(rows)))
    model.merge_adapter()  # type: ignore[operator]
    try:
        merged = model(**inputs).logits
    finally:
        model.unmerge_adapter()  # type: ignore[operator]
    expect(
        close(merged[None], beside, 1e-4), "merged weights give other scores than the adapter beside the base"
    )


def _refuses_to_merge(model: PeftModel) -> bool:
    try:
        model.merge_adapter()  # type: ignore[operator]
    except KilobayesError:
        return True
    return False


def check_reload(model: PeftModel, theta: Params) -> None:
    """A PEFT checkpoint of one member comes back bit for bit."""
    host.write(model, theta)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        back = host.read(PeftModel.from_pretrained(tiny_base(), folder))  # type: ignore[arg-type]
    odd = tree.first_difference(tree.clone(back), theta)
    expect(not odd, f"leaf {odd} differs after saving and loading")


def _check_dropout(adapter: Any, theta: Params) -> None:
    if hasattr(adapter, "drop"):
        stack = tree.size(theta)
        together = adapter.drop(theta, Streams([generator(3, m) for m in range(stack)]))
        for index in range(stack):
            alone = adapter.drop(tree.member(theta, index), Streams([generator(3, index)]))
            expect(
                not tree.first_difference(alone, tree.member(together, index)),
                "dropout depends on other members",
            )
        if getattr(adapter, "dropout", 0.0):
            expect(bool(tree.first_difference(together, theta)), "dropout drops nothing")
