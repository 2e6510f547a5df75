r"""Averages of hosted adapters: of their leaves where that averages the updates, else of the updates.

An adapter whose update is linear in its leaves (LoRA-XS's R, MoRA's M, trained heads) is averaged by its
leaves, exactly. Products are not: LoRA's B A, VeRA's two diagonals, NOLA's mixtures, VB-LoRA's vectors
chosen from a bank. Which case it is is not looked up but measured, on the adapters to be averaged: the
operators of the averaged leaves against the average of the operators, on random inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kilobayes import gauge, host
from kilobayes.adapters import LoRA
from kilobayes.errors import KilobayesError
from kilobayes.host.rows import members
from kilobayes.random import generator
from kilobayes.types import LowRank, Operator, Params

WAYS = ("auto", "updates", "leaves")
EXACT = 1e-4  # relative; float32 leaves, and base constants of any precision
PROBES = 16


@dataclass(frozen=True, eq=False)
class Mixed:
    """Leaves ``(V, ...)`` of averaged adapters.

    Attributes:
        how: "leaves" or "updates".
        lost: ``(V,)`` distance of the updates to the exact averages, over their norm.
    """

    theta: Params
    how: str
    lost: Tensor


def mix(theta: Params, weights: Tensor) -> Params:
    """Leaves ``(U, ...)`` averaged one by one: ``(V, ...)``, by weights ``(V, U)``."""
    return {
        k: torch.einsum("vu,u...->v...", weights.to(v.device, torch.float64), v.detach().double()).to(v)
        for k, v in theta.items()
    }


def average(
    model: nn.Module, theta: Params, weights: Tensor, *, how: str = "auto", name: str | None = None
) -> Mixed:
    """A stack of users' adapters, averaged by rows of weights into a stack of the same adapter.

    Args:
        model: hosts the adapter; its own leaves do not matter.
        theta: ``(U, ...)``, heads included, which are linear.
        weights: ``(V, U)``, such as a matrix of trust.
        how: "updates" for the best update of the adapter's rank (LoRA's alone can be written back as leaves),
            "leaves" for averages of the leaves whatever they mean, "auto" for leaves where they are exact and
            updates elsewhere.

    Raises:
        KilobayesError: another ``how``; updates of an adapter that has no leaves for any update.
    """
    check_way(how)
    mixed = mix(theta, weights)
    if how != "updates":
        apart = discrepancy(model, theta, mixed, weights, name)
        if how == "leaves" or bool((apart <= EXACT).all()):
            return Mixed(mixed, "leaves", apart)
    adapter = host.method(model, name)
    if not isinstance(adapter, LoRA):
        raise KilobayesError(
            f"averages of {adapter!r} are no {type(adapter).__name__}",
            "its update is not linear in its leaves",
            'take LoRA, or LoRAXS or MoRA, which are; or how="leaves", which averages the leaves as they are',
        )
    apart2 = whole2 = torch.zeros(len(weights), dtype=torch.float64)
    for site, operator in factors(model, theta, name).items():
        found = gauge.average(operator.A, operator.B, weights, rank=operator.A.shape[1])
        size = gauge.norm(*gauge.concatenated(operator.A.double(), operator.B.double(), weights)).cpu()
        mixed[f"{site}/A"], mixed[f"{site}/B"] = found.A, found.B / adapter.scale
        apart2, whole2 = apart2 + (found.lost.cpu() * size).square(), whole2 + size.square()
    return Mixed(mixed, "updates", (apart2 / whole2.clamp(min=1e-300)).sqrt())


def check_way(how: str) -> None:
    """Raises KilobayesError for a ``how`` that there is not."""
    if how not in WAYS:
        raise KilobayesError(f"cannot average by {how!r}", f"known: {', '.join(WAYS)}")


@torch.no_grad()
def factors(model: nn.Module, theta: Params, name: str | None = None) -> dict[str, LowRank]:
    """The low-rank factors of every site's update ``(S, ...)``.

    Raises:
        KilobayesError: an update that is not of low rank, or not linear in its input.
    """
    built, out = host.build(model, theta, name), {}
    for site in host.sites(model, name):
        operator = built[site.name]
        if not isinstance(operator, LowRank):
            raise KilobayesError(
                f"updates of {host.method(model, name)!r} cannot be summed in factors of low rank",
                getattr(operator, "nonlinear", "") or f"a {type(operator).__name__} at {site.name}",
                'how="leaves" averages the leaves as they are',
            )
        out[site.name] = operator
    return out


@torch.no_grad()
def gram(model: nn.Module, theta: Params, name: str | None = None) -> Tensor:
    """Inner products ``(U, U)`` of users' updates over all sites, heads apart; exact for low rank.

    Other updates are compared by what they do to random inputs.
    """
    built = host.build(model, theta, name)
    total: Tensor = torch.zeros((), dtype=torch.float64)
    for site in host.sites(model, name):
        operator = built[site.name]
        if isinstance(operator, LowRank):
            part = gauge.gram(operator.A, operator.B)
        else:
            flat = _probed(operator, site.d_in).double().flatten(1)
            part = flat @ flat.mT / PROBES
        total = total + part.cpu()
    return total


@torch.no_grad()
def discrepancy(
    model: nn.Module, theta: Params, mixed: Params, weights: Tensor, name: str | None = None
) -> Tensor:
    """How far the updates of mixed leaves are from the mixed updates ``(V,)``, over the latter's norm.

    Over all sites, on random inputs.
    """
    users, found = host.build(model, theta, name), host.build(model, mixed, name)
    apart = whole = parts = torch.zeros(len(weights), dtype=torch.float64)
    for site in host.sites(model, name):
        each = _probed(users[site.name], site.d_in).double()
        w = weights.to(each)
        exact = torch.einsum("vu,u...->v...", w, each)
        off = _probed(found[site.name], site.d_in).double() - exact
        apart = apart + off.square().flatten(1).sum(dim=1).cpu()
        whole = whole + exact.square().flatten(1).sum(dim=1).cpu()
        parts = parts + (w.square() @ each.square().flatten(1).sum(dim=1)).cpu()
    # where the mixture cancels, what rounding leaves is measured by what was cancelled
    return (apart / torch.maximum(whole, 1e-6 * parts).clamp(min=1e-300)).sqrt()


def _probed(operator: Operator, d_in: int) -> Tensor:
    """What an operator makes of the same random inputs for each member ``(S, PROBES, d_out)``."""
    first = next(v for v in vars(operator).values() if isinstance(v, Tensor))
    x = torch.randn(PROBES, d_in, generator=generator(d_in, PROBES)).to(first)
    return operator(x.expand(members(operator), -1, -1))
