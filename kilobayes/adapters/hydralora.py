r"""One projection down, several up, a router between them (HydraLoRA), Tian et al., arXiv:2404.19245.

.. math:: y = W x + s \sum_{i=1}^{N} g_i(x)\, B_i A x, \qquad
          g(x) = \mathrm{softmax}(R x), \qquad s = \alpha / r

A ``(S, r, d_in)`` and the router R ``(S, N, d_in)`` start Kaiming-uniform with a = sqrt 5, that is
U(+-1/sqrt(d_in)). The heads B_i start at zero, so training starts at the base model; they are one leaf B
``(S, d_out, N r)``, head i in the columns from i r. Gates are per token, their softmax is in float32.

What the router reads: the published code gives it x; the paper's text has a matrix of r x N, which can only
read A x, and the paper's counts of parameters leave no room for more. The default is the code's,
``router="input"``, with which the published results were made; ``router="rank"`` is the text's: R
``(S, N, r)``, and g is the softmax of R A x.

With one head there is nothing to choose: there is no router, and it is LoRA.

A token-dependent update is no matrix, so it cannot be merged into the weights. :func:`with_mean_gate` makes
the LoRA that has every head at an average gate, which is another function, under that name alone.

Departures. A x is computed once for all heads under one dropout mask, instead of once for each; dropout is on
the columns of A, see :mod:`kilobayes.adapters.lora`, and as in the published code the router reads what is
not dropped. The published code's load-balancing term, 0 as its training runs it, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kilobayes.adapters.lora import LoRA
from kilobayes.random import Streams
from kilobayes.types import LowRank, Params, Site

ROUTERS = ("input", "rank")


@dataclass(frozen=True, eq=False)
class Routed:
    """Heads weighed by a router, anew for each token.

    Attributes:
        down: ``(S, r, d_in)``, or ``(S, r + N, d_in)`` with the router in the last N rows.
        up: ``(S, d_out, N r)``, the scale in it.
        router: ``(S, N, r)``, of ``down``'s output, or None if it is in ``down``.
        heads: N.
    """

    nonlinear: ClassVar[str] = "its router weighs the heads anew for each token"
    instead: ClassVar[str] = "serve it unmerged, or make a LoRA of it by adapters.hydralora.with_mean_gate"

    down: Tensor
    up: Tensor
    router: Tensor | None
    heads: int

    def __call__(self, x: Tensor) -> Tensor:
        """``(S, N, d_in) -> (S, N, d_out)``."""
        low, gates = self._split(x)
        weighed = gates.to(low.dtype)[..., None] * low[:, :, None]
        return torch.bmm(weighed.flatten(2), self.up.mT)

    def gates(self, x: Tensor) -> Tensor:
        """g of inputs ``(S, N, d_in)``: ``(S, N, heads)``, float32, the sum of each row 1."""
        return self._split(x)[1]

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.bmm(x, self.down.mT)
        if self.router is None:
            low, scores = out[..., : -self.heads], out[..., -self.heads :]
        else:
            low, scores = out, torch.bmm(out, self.router.mT)
        return low, scores.softmax(dim=-1, dtype=torch.float32)


@dataclass(frozen=True)
class HydraLoRA:
    """LoRA with one A and several B, weighed by a router for each token; cannot be merged.

    Args:
        r: rank.
        heads: N, how many B share the A.
        alpha: scale times r; None for ``2 r``.
        router: what the router reads: "input", x as in the published code, or "rank", A x as in the paper.
        dropout: probability that a column of A is dropped in a training step.

    Raises:
        ValueError: a rank or a number of heads below 1, another router, or a dropout outside [0, 1).
    """

    r: int = 8
    heads: int = 3
    alpha: float | None = None
    router: str = "input"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise ValueError(f"heads must be at least 1, found {self.heads}")
        if self.router not in ROUTERS:
            raise ValueError(f"router must be {' or '.join(ROUTERS)}, found {self.router!r}")
        self.lora()  # r and dropout are checked there

    def lora(self) -> LoRA:
        """The LoRA of one head."""
        return LoRA(r=self.r, alpha=self.alpha, dropout=self.dropout)

    def init(self, sites: list[Site], constants: Params, stack: int, gen: torch.Generator) -> Params:
        def uniform(rows: int, width: int) -> Tensor:
            return (2.0 * torch.rand(stack, rows, width, generator=gen) - 1.0) / math.sqrt(width)

        theta: Params = {}
        for site in sites:
            theta[f"{site.name}/A"] = uniform(self.r, site.d_in)
            theta[f"{site.name}/B"] = torch.zeros(stack, site.d_out, self.heads * self.r)
            if self.heads > 1:
                theta[f"{site.name}/router"] = uniform(self.heads, self._reads(site))
        return theta

    def _reads(self, site: Site) -> int:
        return site.d_in if self.router == "input" else self.r

    def build(self, params: Params, constants: Params, site: Site) -> LowRank | Routed:
        if self.heads == 1:
            return self.lora().build(params, constants, site)
        a, up, router = params["A"], self.lora().scale * params["B"], params["router"]
        if self.router == "rank":
            return Routed(a, up, router, self.heads)
        return Routed(torch.cat([a, router], dim=1), up, None, self.heads)

    def drop(self, params: Params, streams: Streams) -> Params:
        """A training step's dropout, LoRA's: columns of A."""
        return self.lora().drop(params, streams)

    def count(self, sites: list[Site]) -> int:
        """Numbers trained and stored: the sum over sites of r d_in + N r d_out + N d_in.

        The last term is N r if the router reads A x, and absent with one head.
        """
        routers = sum(self.heads * self._reads(site) for site in sites) if self.heads > 1 else 0
        return routers + sum(self.r * (site.d_in + self.heads * site.d_out) for site in sites)


def with_mean_gate(
    adapter: HydraLoRA, theta: Params, gates: Mapping[str, Tensor] | None = None
) -> tuple[LoRA, Params]:
    r"""The LoRA whose B is :math:`\sum_i \bar g_i B_i`: an approximation, which can be merged and exported.

    Args:
        theta: a stack; leaves of heads stay as they are.
        gates: of each site ``(S, N)``, as :func:`mean_gates` measures them; 1 / N each if not given.
    """
    out: Params = {}
    for key, value in theta.items():
        site, _, leaf = key.rpartition("/")
        if leaf == "B":
            parts = value.unflatten(2, (adapter.heads, adapter.r))
            even = value.new_full((len(value), adapter.heads), 1.0 / adapter.heads)
            gate = even if gates is None else gates[site].to(value)
            out[key] = torch.einsum("sonr,sn->sor", parts, gate)
        elif leaf != "router":
            out[key] = value
    return adapter.lora(), out


@torch.no_grad()
def mean_gates(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Params:
    """The average gates ``(S, N)`` of each site over the tokens of some rows, padding left out.

    Args:
        model: a hosted model, as it is to be averaged; the adapter's parameters are what runs.
        batches: model inputs; block s of the rows goes to member s.
    """
    totals: Params = {}
    real: list[Any] = [None]

    def look(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        operator = next(o for o in layer.operators() if isinstance(o, Routed))
        x = inputs[0].to(operator.down.dtype)
        gates = operator.gates(x.reshape(len(operator.down), -1, x.shape[-1]))
        if real[0] is not None and real[0].shape == x.shape[:-1]:
            gates = gates * real[0].reshape(*gates.shape[:2], 1).to(gates)
        totals[layer.path] = totals.get(layer.path, torch.zeros(())).to(gates) + gates.sum(dim=1)

    hosted: list[Any] = [layer for layer in model.modules() if hasattr(layer, "operators")]
    routed = [layer for layer in hosted if any(isinstance(o, Routed) for o in layer.operators())]
    hooks = [layer.register_forward_pre_hook(look) for layer in routed]
    try:
        for batch in batches:
            real[0] = batch.get("attention_mask")
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: total / total.sum(dim=1, keepdim=True) for path, total in totals.items()}
