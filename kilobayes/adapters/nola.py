r"""NOLA, low-rank factors as mixtures of random matrices: Koohpayegani et al., arXiv:2310.02556.

.. math:: \Delta W = \frac{\alpha}{r} B A, \qquad
          A = A_0 + c \sum_{i=1}^{k} m_i A_i, \qquad B = c \sum_{i=1}^{k} n_i B_i, \qquad c = 1 / \sqrt k

A_i ``(r, d_in)`` and B_i ``(d_out, r)`` are frozen, uniform in [-1, 1) and drawn from a seed for each matrix;
A_0 is frozen at LoRA's start, U(+-1/sqrt(d_in)). Trained are the coefficients ``mix_A`` m and ``mix_B`` n,
both ``(S, k)`` for each site. They start at zero, so training starts at the base model.

The random numbers are functions of their index (:mod:`kilobayes.counter`), in float32: the same on every
device, for every dtype of the base, and without touching a generator. A basis takes ``4 k r (d_in + d_out)``
bytes for each site. If that is at most ``held`` MiB for all sites together, it is kept in memory. Otherwise
nothing is kept: its numbers are made a few at a time whenever factors are built, and again when gradients go
back through them,

.. math:: \partial L / \partial m_i = c\, \langle \partial L / \partial A, A_i \rangle.

Departures: with ``basis="shape"`` all sites of one width share a basis, so that as many are held as there
are widths; coefficients and A_0 stay each site's own. c is that of the authors' LLaMA code; their README has
1, which only rescales the coefficients. The paper draws from torch's generator, differently on each device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kilobayes import counter
from kilobayes.types import LowRank, Params, Site

PIECE = 1 << 22  # random numbers made at a time where a basis is not held


def _rows(key: int, count: int, numbers: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """The basis ``(count, numbers)`` of a key in pieces of whole rows, each with the index of its first."""
    step = max(1, PIECE // numbers)
    for first in range(0, count, step):
        rows = min(step, count - first)
        drawn = counter.uniform(key, first * numbers, rows * numbers, device).view(rows, numbers)
        yield first, drawn.mul_(2.0).sub_(1.0)


class _Mixture(torch.autograd.Function):
    """``(S, k)`` coefficients to ``(S, numbers)``: a product with a basis that is never held."""

    @staticmethod
    def forward(ctx: Any, mix: Tensor, key: int, numbers: int) -> Tensor:
        ctx.key, ctx.count = key, mix.shape[1]
        out = mix.new_zeros(len(mix), numbers)
        for first, piece in _rows(key, mix.shape[1], numbers, mix.device):
            out.addmm_(mix[:, first : first + len(piece)], piece.to(mix))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _Products.apply(grads[0], ctx.key, ctx.count), None, None


class _Products(torch.autograd.Function):
    """The transpose of :class:`_Mixture`: ``(S, numbers)`` to inner products with each of k basis rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, key: int, count: int) -> Tensor:
        ctx.key, ctx.numbers = key, x.shape[1]
        return torch.cat([x @ piece.to(x).mT for _, piece in _rows(key, count, x.shape[1], x.device)], dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _Mixture.apply(grads[0], ctx.key, ctx.numbers), None, None


@dataclass(frozen=True)
class NOLA:
    """Low-rank factors that are mixtures of random matrices: only the coefficients are trained.

    Args:
        r: rank; it costs time, and nothing in the file.
        k: random matrices mixed for A, and as many for B.
        alpha: scale of the update, divided by r; None for ``2 r``.
        basis: "matrix", a basis for each matrix as in the paper, or "shape", one for all of a shape.
        held: largest basis, in MiB over all sites, that is kept in memory; 0 keeps none.
        seed: of the random matrices.

    Raises:
        ValueError: r or k below 1, ``held`` below 0, or an unknown kind of basis.
    """

    r: int = 8
    k: int = 256
    alpha: float | None = None
    basis: str = "matrix"
    held: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("r", 1), ("k", 1), ("held", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, found {getattr(self, name)}")
        if self.basis not in ("matrix", "shape"):
            raise ValueError(f'basis must be "matrix" or "shape", found {self.basis!r}')

    @property
    def scale(self) -> float:
        """alpha / r."""
        return (2.0 * self.r if self.alpha is None else self.alpha) / self.r

    def key(self, site: Site, leaf: str) -> int:
        """The seed of one of a site's random tensors; of one for all sites of its width under "shape"."""
        width = site.d_in if leaf == "A" else site.d_out
        whose = f"*{width}" if self.basis == "shape" and leaf != "start" else site.name
        digest = hashlib.blake2b(f"{leaf} {whose}".encode(), digest_size=8).digest()
        return counter.key(self.seed, int.from_bytes(digest, "little"))

    def bases(self, sites: list[Site]) -> dict[str, tuple[int, int]]:
        """All bases by the name of their constant, each with its seed and the numbers ``r d`` of a row."""
        found = {}
        for site in sites:
            for leaf, width in (("A", site.d_in), ("B", site.d_out)):
                name = f"*/basis_{leaf}_{width}" if self.basis == "shape" else f"{site.name}/basis_{leaf}"
                found[name] = self.key(site, leaf), self.r * width
        return found

    def freeze(self, sites: list[Site]) -> Params:
        """A_0 of every site, and the bases ``(k, r d)`` if they are to be held."""
        out: Params = {}
        for site in sites:
            drawn = counter.uniform(self.key(site, "start"), 0, self.r * site.d_in)
            out[f"{site.name}/start"] = (2.0 * drawn - 1.0).view(self.r, -1) / math.sqrt(site.d_in)
        bases = self.bases(sites)
        if 4 * self.k * sum(numbers for _, numbers in bases.values()) <= self.held * 2**20:
            for name, (key, numbers) in bases.items():
                pieces = _rows(key, self.k, numbers, torch.device("cpu"))
                out[name] = torch.cat([piece for _, piece in pieces])
        return out

    def init(self, sites: list[Site], constants: Params, stack: int, gen: torch.Generator) -> Params:
        return {f"{site.name}/mix_{leaf}": torch.zeros(stack, self.k) for site in sites for leaf in "AB"}

    def build(self, params: Params, constants: Params, site: Site) -> LowRank:
        def mixture(leaf: str, width: int) -> Tensor:
            mix = params[f"mix_{leaf}"] / math.sqrt(self.k)
            name = f"basis_{leaf}_{width}" if self.basis == "shape" else f"basis_{leaf}"
            if name in constants:
                return mix @ constants[name].to(mix)
            return _Mixture.apply(mix, self.key(site, leaf), self.r * width)

        a = mixture("A", site.d_in).unflatten(1, (self.r, site.d_in))
        b = mixture("B", site.d_out).unflatten(1, (site.d_out, self.r))
        return LowRank(A=a + constants["start"].to(a), B=self.scale * b)

    def rates(self) -> dict[str, float]:
        """6e-3 at the default rate of 2e-3; the paper has 1e-3 for Llama-2 to 1e-2 for GPT-2."""
        return {"mix_A": 3.0, "mix_B": 3.0}

    def count(self, sites: list[Site]) -> int:
        """Numbers trained and stored: 2 k for each site."""
        return 2 * self.k * len(sites)
