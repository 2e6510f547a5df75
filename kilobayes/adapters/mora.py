r"""High-rank updating (MoRA), Jiang et al., arXiv:2405.12130: one square matrix between two fixed maps.

.. math:: y = W x + \mathrm{up}(M \, \mathrm{down}(x)), \qquad
          \hat r = \bigl\lfloor \sqrt{(d_{in} + d_{out})\, r} + 1/2 \bigr\rfloor

M ``(S, rhat, rhat)`` is all that is trained, about as many numbers as LoRA's of rank r. It starts at zero, so
training starts at the base model; there is no alpha. x is cut into blocks of rhat numbers, the last one
filled up from the beginning of x.

``kind="share"`` (type 1 of the published code): down sums the blocks, up repeats the output of M until d_out
is reached. But for the filling, ``dW[o, i] = M[o mod rhat, i mod rhat]``. The update has rank rhat.

``kind="rotate"`` (type 6): block b is rotated before M, its coordinates j and j + rhat / 2 by the angle
``b 10000^(-2 j / rhat)``; what M makes of the blocks, one after another, is cut or repeated to d_out. The
update has rank min(d_in, d_out) for almost every M. rhat is rounded down to an even number.

Departures. Where the input has more blocks than the output, the published code cuts off what M makes of the
last ones, so that part of x has no effect (6,832 of the 11,008 inputs of Llama-2-7B's ``down_proj``);
here block b adds to block b modulo the number of output blocks. rhat is at most d_in and d_out, beyond which
rows of M would reach nothing. Angles are computed with the operator; the published code keeps those of the
layer's first adapter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from kilobayes.types import Params, Site

KINDS = ("rotate", "share")
BASE = 10000.0  # of the angles, as in rotary position embeddings


@dataclass(frozen=True, eq=False)
class Square:
    """The update of each member through its square matrix.

    Attributes:
        M: ``(S, rhat, rhat)``.
        cos, sin: of the angles ``(S, blocks, rhat / 2)``, or None where blocks are summed unrotated.
        d_out: output width.
    """

    M: Tensor
    cos: Tensor | None
    sin: Tensor | None
    d_out: int

    def __call__(self, x: Tensor) -> Tensor:
        """``(S, N, d_in) -> (S, N, d_out)``."""
        return repeated(self._summed(x) if self.cos is None else self._rotated(x), self.d_out)

    def _summed(self, x: Tensor) -> Tensor:
        """``(S, N, rhat)``."""
        side = self.M.shape[-1]
        whole, rest = divmod(x.shape[-1], side)
        if not rest:
            return torch.bmm(x.unflatten(-1, (whole, side)).sum(dim=2), self.M.mT)
        # pieces instead of overlapping slices: a slice's gradient would be as large as x
        begin, first, others, last = x.split([side - rest, rest, (whole - 1) * side, rest], dim=-1)
        low = others.unflatten(-1, (whole - 1, side)).sum(dim=2)
        low = low + torch.cat([begin, first], dim=-1) + torch.cat([last, begin], dim=-1)
        return torch.bmm(low, self.M.mT)

    def _rotated(self, x: Tensor) -> Tensor:
        """``(S, N, outputs rhat)``; M is rotated instead of x, being smaller than all rows together."""
        assert self.cos is not None
        assert self.sin is not None
        (stack, rows, _), side, count = x.shape, self.M.shape[-1], self.cos.shape[1]
        outputs = min(count, -(-self.d_out // side))
        rounds = -(-count // outputs)
        first, second = self.M[:, None].chunk(2, dim=-1)
        cos, sin = self.cos[:, :, None], self.sin[:, :, None]
        turned = torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)
        turned = pad(turned, (0, 0, 0, 0, 0, rounds * outputs - count))  # (S, rounds outputs, rhat, rhat)
        maps = turned.unflatten(1, (rounds, outputs)).permute(0, 2, 3, 1, 4)
        blocks = repeated(x, rounds * outputs * side).unflatten(-1, (rounds, outputs, side))
        blocks = blocks.permute(0, 3, 1, 2, 4)
        shape = (stack * outputs, -1, rounds * side)
        out = torch.bmm(blocks.reshape(shape), maps.reshape(shape).mT)
        return out.unflatten(0, (stack, outputs)).transpose(1, 2).reshape(stack, rows, -1)


def repeated(x: Tensor, width: int) -> Tensor:
    """x, its last axis repeated from the start, or cut, to a width."""
    times, rest = divmod(width, x.shape[-1])
    if not rest:
        return x if times == 1 else torch.cat([x] * times, dim=-1)
    begin, end = x.split([rest, x.shape[-1] - rest], dim=-1)
    return torch.cat([begin, end] * times + [begin], dim=-1) if times else begin


@dataclass(frozen=True)
class MoRA:
    """One square matrix for each adapted weight: as many numbers as LoRA, an update of high rank.

    Args:
        r: the rank of the LoRA that has as many numbers.
        kind: "rotate", the paper's choice for small r (``mora_type=6`` in the published code), or "share",
            that for r of 128 and more (``mora_type=1``).

    Raises:
        ValueError: a rank below 1, another kind, or a layer of width 1 under "rotate".
    """

    r: int = 8
    kind: str = "rotate"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r must be at least 1, found {self.r}")
        if self.kind not in KINDS:
            raise ValueError(f"kind must be {' or '.join(KINDS)}, found {self.kind!r}")

    def side(self, site: Site) -> int:
        """rhat, the rows and the columns of a site's M."""
        side = min(int(math.sqrt((site.d_in + site.d_out) * self.r) + 0.5), site.d_in, site.d_out)
        if self.kind == "share":
            return side
        if side < 2:
            raise ValueError(
                f"{site.name} maps {site.d_in} to {site.d_out} numbers: too few to rotate, take kind='share'"
            )
        return side // 2 * 2

    def init(self, sites: list[Site], constants: Params, stack: int, gen: torch.Generator) -> Params:
        return {f"{site.name}/M": torch.zeros(stack, self.side(site), self.side(site)) for site in sites}

    def build(self, params: Params, constants: Params, site: Site) -> Square:
        matrix = params["M"]
        if self.kind == "share":
            return Square(matrix, None, None, site.d_out)
        stack, side = matrix.shape[:2]
        places = torch.arange(-(-site.d_in // side), device=matrix.device, dtype=matrix.dtype)
        halves = torch.arange(side // 2, device=matrix.device, dtype=matrix.dtype)
        angles = torch.outer(places, BASE ** (-2.0 * halves / side)).expand(stack, -1, -1)
        return Square(matrix, angles.cos(), angles.sin(), site.d_out)

    def rates(self) -> dict[str, float]:
        """Rotated blocks ask for more than the default rate of 2e-3, at which trained heads learn."""
        return {"M": 3.0} if self.kind == "rotate" else {}

    def count(self, sites: list[Site]) -> int:
        """Numbers trained and stored: the sum over sites of rhat squared."""
        return sum(self.side(site) ** 2 for site in sites)
