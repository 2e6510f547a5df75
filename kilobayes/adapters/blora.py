r"""Bayesian-LoRA (B-LoRA), Meo et al., arXiv:2406.13046: LoRA that learns its ranks and its bit widths.

.. math:: y = W x + s\, Q_{z_B}(B)\, \operatorname{diag}(\hat g)\, Q_{z_A}(A)\, x, \qquad
          \hat g_i = \prod_{j \le i} g_j, \quad g_1 = 1

A ``(S, r, d_in)`` and B ``(S, d_out, r)`` as in LoRA, each quantised by Q (:mod:`kilobayes.adapters.bits`),
with a gate for each of 4, 8, 16 and 32 bits of either factor, and one for each rank after the first. While
training, gates are noisy (hard concrete); for prediction they are open or closed. Both kinds are nested, so
what is learned is a rank and two widths for each adapted matrix. The mean loss of a row gains the number of
gates that are expected to be open, each at its price:

.. math:: \lambda_q \sum_{X \in A, B}\ \sum_{b = 4, \ldots, 32}\ \prod_{b' \le b} P(z_{X, b'} > 0)
          \;+\; \lambda_r \sum_{i = 2}^{r}\ \prod_{j = 2}^{i} P(g_j > 0)

in nats a row, so of N rows a gate is open with the prior probability :math:`e^{-\lambda N}`. What is stored
after training (``pack``) is what the gates decided and nothing else: ranks, widths, ranges, and integers of
so many bits. It is read back to the same update bit for bit.

Of the paper, which published no code and was at hand as its abstract and summaries, are the nested gates on
ranks and on widths, the loss with prices of 1, and the count of bit operations; of Bayesian Bits, on which it
builds, the grids, the gates' constants and the threshold. That prices are in nats a row, and all that is not
named here, is our reading.

Departures. The factors are LoRA's, with no diagonal matrix between them, so training starts at the base
model. Frozen weights stay as they are, where the paper quantises them in simulation, and so do activations:
the operations saved are those of the adapter, not of the model. 2 bits are the least, pruning is left to the
gates on ranks. The range c of a factor is learned as its logarithm, and starts at the bound of A's start,
for B too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kilobayes.adapters import bits
from kilobayes.adapters.lora import LoRA
from kilobayes.random import Streams
from kilobayes.tree import size, split_key
from kilobayes.types import LowRank, Params, Progress, Site


@dataclass(frozen=True)
class Structure:
    """What the gates decided, for each member and site.

    Attributes:
        ranks: ``(S, sites)``.
        widths: bits of A and of B ``(S, sites, 2)``.
    """

    ranks: Tensor
    widths: Tensor


@dataclass(frozen=True)
class BLoRA:
    """LoRA that learns each matrix's rank and the bit width of its factors, and is stored in these bits.

    Args:
        r: the largest rank.
        alpha: scale; None for ``2 r``.
        bits_prior: lambda_q, the price of an open gate on a width, in nats a row.
        rank_prior: lambda_r, the price of an open gate on a rank, in nats a row.
        start: logit phi of every gate at the start of training.
        speed: learning rate of the gates, relative to that of the factors; ranges learn at a fifth of it.

    Raises:
        ValueError: a rank below 1, a negative price, gates that would start closed, or that stand still.
    """

    r: int = 8
    alpha: float | None = None
    bits_prior: float = 1.0
    rank_prior: float = 1.0
    start: float = 3.0
    speed: float = 40.0

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r must be at least 1, found {self.r}")
        for name in ("bits_prior", "rank_prior"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number from 0 up, found {getattr(self, name)}")
        if not 0.0 <= self.start <= 10.0:
            raise ValueError(f"start must lie in [0, 10], found {self.start}")
        if not 0.0 < self.speed < math.inf:
            raise ValueError(f"speed must be above 0, found {self.speed}")

    @property
    def scale(self) -> float:
        """s, the factor of B A."""
        return LoRA(self.r, self.alpha).scale

    def init(self, sites: list[Site], constants: Params, stack: int, gen: torch.Generator) -> Params:
        theta = LoRA(self.r).init(sites, constants, stack, gen)
        for site in sites:
            theta[f"{site.name}/bits"] = torch.full((stack, 2, len(bits.WIDTHS) - 1), self.start)
            theta[f"{site.name}/clip"] = torch.full((stack, 2), -0.5 * math.log(site.d_in))
            if self.r > 1:
                theta[f"{site.name}/rank"] = torch.full((stack, self.r - 1), self.start)
        return theta

    def build(self, params: Params, constants: Params, site: Site) -> LowRank:
        def gates(name: str) -> Tensor:
            return params[f"{name}_drawn"] if f"{name}_drawn" in params else bits.decided(params[name])

        widths, clip = gates("bits"), params["clip"].exp()
        a = bits.quantise(params["A"], clip[:, 0], widths[:, 0])
        b = bits.quantise(params["B"], clip[:, 1], widths[:, 1])
        if self.r > 1:
            later = gates("rank").cumprod(dim=1)
            g = torch.cat([torch.ones_like(later[:, :1]), later], dim=1)
            a, b = a * (g > 0)[:, :, None], b * g[:, None]
        return LowRank(A=a, B=self.scale * b)

    def drop(self, params: Params, streams: Streams) -> Params:
        """A training step's gates, drawn beside their logits as ``bits_drawn`` and ``rank_drawn``."""
        noisy = {k: v for k, v in params.items() if split_key(k)[1] in ("bits", "rank")}
        return params | {f"{k}_drawn": bits.drawn(v, streams) for k, v in noisy.items()}

    def penalty(self, theta: Params, progress: Progress) -> Tensor:
        """The price of the gates expected to be open ``(S,)``, in nats a row."""
        price = {"bits": self.bits_prior, "rank": self.rank_prior}
        of = [(price.get(split_key(k)[1], 0.0), v) for k, v in theta.items()]
        parts = [p * bits.probability(v).cumprod(dim=-1).flatten(1).sum(dim=1) for p, v in of if p]
        return torch.stack(parts).sum(dim=0) if parts else next(iter(theta.values())).new_zeros(size(theta))

    def restrict(self, draws: Params, around: Params, progress: Progress | None) -> Params:
        """After training, draws of a posterior have the ranks and widths of what they are drawn around."""
        fixed = {k: v for k, v in around.items() if split_key(k)[1] in ("bits", "rank") and progress is None}
        return draws | {k: v.detach() + 0.0 * draws[k] for k, v in fixed.items()}  # and no gradient there

    def rates(self) -> dict[str, float]:
        return {"bits": self.speed, "rank": self.speed, "clip": 0.2 * self.speed}

    def count(self, sites: list[Site]) -> int:
        """Numbers trained: the sum over sites of r (d_in + d_out), r - 1 + 8 gates and 2 ranges."""
        return LoRA(self.r).count(sites) + len(sites) * (self.r + 9)

    def stored(self, sites: list[Site]) -> int:
        """Bytes of :meth:`pack` before training, with every gate open: what is learned can only be less."""
        return 4 * LoRA(self.r).count(sites) + len(sites) * (2 + 2 + 8)

    def structure(self, theta: Params, sites: list[Site]) -> Structure:
        """The ranks and widths that a stack's gates decide."""

        def opened(name: str, site: Site) -> Tensor:
            return (
                bits.decided(theta[f"{site.name}/{name}"].detach()).cumprod(dim=-1).sum(dim=-1).long().cpu()
            )

        widths = torch.stack([opened("bits", site) for site in sites], dim=1)
        ranks = torch.stack([opened("rank", s) if self.r > 1 else 0 * widths[:, 0, 0] for s in sites], dim=1)
        return Structure(1 + ranks, torch.tensor(bits.WIDTHS)[widths])

    def operations(self, theta: Params, sites: list[Site]) -> Tensor:
        """Bit operations of the adapter for one token ``(S,)``, as Bayesian Bits counts them.

        A matrix of n m weights takes n m multiplications, of b_w b_x bit operations each: k d_in b_A 32 for A
        and d_out k b_B 32 for B at rank k, since activations are not quantised. LoRA's are
        r (d_in + d_out) 1024.
        """
        found = self.structure(theta, sites)
        widths = torch.tensor([[site.d_in, site.d_out] for site in sites])
        return 32 * (found.ranks[..., None] * widths * found.widths).sum(dim=(1, 2))

    def pack(self, theta: Params, sites: list[Site]) -> dict[str, Tensor]:
        """Ranks, widths, logarithms of ranges and the integers of what is left, as bytes, by member."""
        found, parts = self.structure(theta, sites), []
        clip = torch.stack([theta[f"{site.name}/clip"].detach().cpu() for site in sites], dim=1)
        for m, of in enumerate(found.ranks):
            for index, (site, k) in enumerate(zip(sites, of.tolist(), strict=True)):
                a, b = (theta[f"{site.name}/{f}"][m : m + 1].detach().cpu() for f in "AB")
                for which, x in enumerate((a[:, :k], b[:, :, :k])):
                    width = int(found.widths[m, index, which])
                    code = x if width == 32 else bits.codes(x, clip[m : m + 1, index, which].exp(), width)
                    parts.append(bits.to_bytes(code, width))
        kinds = {"ranks": found.ranks.to(torch.int16), "widths": found.widths.to(torch.uint8), "clip": clip}
        return {**kinds, "codes": torch.cat(parts)}

    def unpack(self, packed: dict[str, Tensor], sites: list[Site]) -> Params:
        """Leaves whose update is that of the packed ones bit for bit; their gates can be trained on."""
        clip, at, theta = packed["clip"], 0, self.init(sites, {}, len(packed["clip"]), torch.Generator())
        for m, of in enumerate(packed["ranks"].tolist()):
            for index, (site, k) in enumerate(zip(sites, of, strict=True)):
                for which, (name, d) in enumerate((("A", site.d_in), ("B", site.d_out))):
                    width, c = int(packed["widths"][m, index, which]), clip[m : m + 1, index, which].exp()
                    end = at + bits.size_in_bytes(k * d, width)
                    code, at = bits.from_bytes(packed["codes"][at:end], width, k * d), end
                    shape = (1, k, d) if name == "A" else (1, d, k)
                    value = code.view(shape) if width == 32 else bits.values(code.view(shape), c, width)
                    leaf = theta[f"{site.name}/{name}"][m]
                    leaf.zero_()
                    (leaf[:k] if name == "A" else leaf[:, :k]).copy_(value[0])
                    theta[f"{site.name}/bits"][m, which, bits.WIDTHS.index(width) :] = -6.0
                if self.r > 1:
                    theta[f"{site.name}/rank"][m, k - 1 :] = -6.0
                theta[f"{site.name}/clip"][m] = clip[m, index]
        return theta
