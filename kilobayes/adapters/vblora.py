r"""Vector-bank LoRA (VB-LoRA), Li, Han & Ji, arXiv:2405.15179: factors are pieced together from one bank.

.. math:: y = W x + B A x, \qquad
          \text{each piece of A's rows and B's columns is } \sum_{j \in T} w_j V_j, \quad
          T = \mathrm{top}_k(\ell), \quad w = \mathrm{softmax}(\ell_T)

The bank V ``(S, h, b)`` is shared by all sites and by both factors, and starts uniform in +-0.02. Every piece
of b numbers has h logits of its own, normal with deviation 0.1 at the start: ``logits_A``
``(S, r, d_in / b, h)`` and ``logits_B`` ``(S, d_out / b, r, h)``. So the update is small before training, but
not zero: a bank of zeros would make it zero, and would get no gradient. There is no alpha.

Trained are h b + R h numbers, R the sum over sites of r (d_in + d_out) / b. Stored are the bank, k indices
for each piece and k - 1 differences of its logits, from which the update comes back bit for bit, and from
which training can go on, with the choice of vectors as it was.

Departures: draws of a posterior mix the vectors that the weights they are drawn around choose, since the
choice is no continuous function of the logits, and the paper finds a noisy one worse. Sums run in the order
of the bank, so that ties among logits change nothing. The paper stores k - 1 weights, which give the last one
up to rounding only. There is no dropout. By default the paper's b of 256 is halved until it fits.
Rates are higher than the paper's 1e-3 of the bank and 1e-2 of logits, for training of hundreds of steps
instead of many thousands: the bank has to grow tenfold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kilobayes.types import LowRank, Params, Progress, Site

LOGITS = ("logits_A", "logits_B")
NEVER = -1e4  # logit of a vector that is not to be chosen: finite, in half precision too, for averages


@dataclass(frozen=True)
class VBLoRA:
    """LoRA whose factors are pieced together from one small bank of vectors, shared by all layers.

    Args:
        r: rank.
        h: vectors in the bank; the paper's 90 suits encoders, 256 small and 2048 large decoders.
        b: length of a vector, which must divide every width adapted; None for the largest power of two up to
            256 that does.
        k: vectors that are mixed for a piece; with 1 the choice stays as it was drawn.

    Raises:
        ValueError: a setting outside its range; once the sites are known, a b that does not divide a width.
    """

    r: int = 4
    h: int = 90
    b: int | None = None
    k: int = 2

    def __post_init__(self) -> None:
        for name in ("r", "h", "b", "k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")
        if self.k > self.h:
            raise ValueError(f"k must be at most h, the vectors in the bank, found k={self.k} and h={self.h}")

    def init(self, sites: list[Site], constants: Params, stack: int, gen: torch.Generator) -> Params:
        b = self.length(sites)
        theta = {"*/bank": 0.02 * (2.0 * torch.rand(stack, self.h, b, generator=gen) - 1.0)}
        for key, shape in self._shapes(sites, b).items():
            theta[key] = 0.1 * torch.randn(stack, *shape, self.h, generator=gen)
        return theta

    def build(self, params: Params, constants: Params, site: Site) -> LowRank:
        a, b = (_mixed(params["bank"], params[leaf], self.k) for leaf in LOGITS)
        return LowRank(A=a.flatten(2), B=b.mT.flatten(1, 2))

    def restrict(self, draws: Params, around: Params, progress: Progress | None = None) -> Params:
        """Draws with the logits of all vectors that ``around`` does not choose at a large negative number."""
        kept = dict(draws)
        for key, value in draws.items():
            if key.endswith(LOGITS) and value is not around[key]:  # weights choose the same as themselves
                kept[key] = _only(value, _chosen(around[key], self.k))
        return kept

    def freeze_indices(self, theta: Params, sites: list[Site]) -> Params:
        """A copy that mixes the same vectors for good: in training, in averages and in any posterior.

        The update is the same bit for bit. Logits that are not among the k largest become -1e4: their
        gradients are zero, as they were, and now they stay behind.

        Args:
            theta: leaves ``(S, ...)``, those of heads included.
            sites: where the adapter sits; other leaves are passed on.
        """
        frozen = dict(theta)
        for key in self._shapes(sites, self.length(sites)):
            frozen[key] = _only(theta[key], _chosen(theta[key], self.k))
        return frozen

    def rates(self) -> dict[str, float]:
        """8 times the rate of heads, for bank and logits alike."""
        return {"bank": 8.0, "logits_A": 8.0, "logits_B": 8.0}

    def length(self, sites: list[Site]) -> int:
        """b on these sites.

        Raises:
            ValueError: it does not divide a width; the message names the site and a b that would do.
        """
        common = math.gcd(*(width for site in sites for width in (site.d_in, site.d_out)))
        if self.b is None:
            return min(256, common & -common)
        for site in sites:
            for width in (site.d_in, site.d_out):
                if width % self.b:
                    fits = max(n for n in range(1, self.b + 1) if common % n == 0)
                    raise ValueError(
                        f"b must divide every adapted width, found b={self.b} and {width} at {site.name}; "
                        f"b={fits} divides all of them, or leave b out"
                    )
        return self.b

    def pieces(self, sites: list[Site]) -> int:
        """R, the pieces that all factors have together: the sum over sites of r (d_in + d_out) / b."""
        return sum(math.prod(shape) for shape in self._shapes(sites, self.length(sites)).values())

    def count(self, sites: list[Site]) -> int:
        """Numbers trained: h b + R h."""
        return self.h * (self.length(sites) + self.pieces(sites))

    def stored(self, sites: list[Site]) -> int:
        """Bytes of :meth:`pack` in float32: 4 h b + R (4 (k - 1) + k s), s = 1 up to h = 256, then 2, 4."""
        index = _narrow(self.h).itemsize
        return 4 * self.h * self.length(sites) + self.pieces(sites) * (4 * (self.k - 1) + self.k * index)

    def pack(self, theta: Params, sites: list[Site]) -> dict[str, Tensor]:
        """The bank, ``indices`` ``(S, R, k)``, and ``differences`` ``(S, R, k - 1)`` unless k is 1.

        Indices start with that of the largest logit; differences are those of the others from it.
        """
        indices, values = [], []
        for key in self._shapes(sites, self.length(sites)):
            chosen = _chosen(theta[key], self.k)
            value = theta[key].detach().gather(-1, chosen).float()
            order = value.argsort(stable=True, dim=-1, descending=True)
            indices.append(chosen.gather(-1, order).flatten(1, -2))
            values.append(value.gather(-1, order).flatten(1, -2))
        value = torch.cat(values, dim=1)
        packed = {"bank": theta["*/bank"].detach(), "indices": torch.cat(indices, dim=1).to(_narrow(self.h))}
        return packed if self.k == 1 else packed | {"differences": value[..., 1:] - value[..., :1]}

    def unpack(self, packed: dict[str, Tensor], sites: list[Site]) -> Params:
        """Leaves that give the packed update bit for bit, with its indices frozen; logits in float32."""
        indices = packed["indices"].long()
        values = torch.zeros(indices.shape, device=indices.device)
        if self.k > 1:
            values[..., 1:] = packed["differences"].float()
        logits = values.new_full((*indices.shape[:-1], self.h), NEVER).scatter(-1, indices, values)
        shapes = self._shapes(sites, self.length(sites))
        parts = logits.split([math.prod(shape) for shape in shapes.values()], dim=1)
        theta = {
            key: part.unflatten(1, shape) for (key, shape), part in zip(shapes.items(), parts, strict=True)
        }
        return {"*/bank": packed["bank"], **theta}

    def _shapes(self, sites: list[Site], b: int) -> dict[str, tuple[int, int]]:
        """How the pieces of each leaf of logits are laid out."""
        return {
            f"{site.name}/{leaf}": (self.r, site.d_in // b)
            if leaf == "logits_A"
            else (site.d_out // b, self.r)
            for site in sites
            for leaf in LOGITS
        }


def _chosen(logits: Tensor, k: int) -> Tensor:
    """Indices of the k largest logits, ascending: ``(..., h)`` to ``(..., k)``."""
    return logits.detach().topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values


def _only(logits: Tensor, chosen: Tensor) -> Tensor:
    """Logits with all but the chosen at a large negative number."""
    return torch.full_like(logits, NEVER).scatter(-1, chosen, logits.gather(-1, chosen))


def _mixed(bank: Tensor, logits: Tensor, k: int) -> Tensor:
    """Pieces ``(S, ..., b)`` of a bank ``(S, h, b)`` by logits ``(S, ..., h)``; reads k vectors for each."""
    stack, h, _ = bank.shape
    chosen = _chosen(logits, k)
    wide = torch.promote_types(logits.dtype, torch.float32)  # as in a packed file, whatever the leaves are
    weights = logits.gather(-1, chosen).softmax(-1, dtype=wide).to(bank.dtype)
    member = torch.arange(stack, device=bank.device).view(-1, *[1] * (logits.dim() - 1))
    # embedding's gradient adds up the same way every time, on GPUs too, where that of index_select does not
    vectors = F.embedding(chosen + h * member, bank.flatten(0, 1))
    return (weights[..., None] * vectors).sum(-2)


def _narrow(h: int) -> torch.dtype:
    """The narrowest type of an index into h vectors."""
    return torch.uint8 if h <= 2**8 else torch.uint16 if h <= 2**16 else torch.int32
