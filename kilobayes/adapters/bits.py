r"""Gated residual quantisation: Bayesian Bits, van Baalen et al., arXiv:2005.07093.

A tensor x, clipped to :math:`[-c, c]`, is rounded to a grid of b = 2 bits, what is left of it to a grid of 4,
and so on; each grid refines the one before, since its step divides it:

.. math:: s_b = \frac{2 c}{2^b - 1}, \qquad s_{2b} = \frac{s_b}{2^b + 1}, \qquad
          e_{2b} = s_{2b} \Bigl\lfloor \frac{x - x_b}{s_{2b}} \Bigr\rceil, \qquad x_{2b} = x_b + e_{2b}

.. math:: x_q = x_2 + z_4 (e_4 + z_8 (e_8 + z_{16} (e_{16} + z_{32} e_{32})))

With gates of 0 and 1 that is the nearest point of the grid of the last open width: :math:`2^b - 1` levels,
zero among them, so a level is a signed integer of b bits. Rounding is straight through. While training, a
gate z of logit phi is hard concrete, Louizos et al., arXiv:1712.01312, with u uniform in (0, 1):

.. math:: z = \operatorname{clamp}\Bigl(\sigma\Bigl(\frac{\operatorname{logit} u + \phi}{\beta}\Bigr)
          (\zeta - \gamma) + \gamma,\ 0,\ 1\Bigr), \qquad
          P(z > 0) = \sigma\Bigl(\phi - \beta \log \frac{-\gamma}{\zeta}\Bigr)

and afterwards 1 if P(z = 0) < 0.34, else 0, as in Bayesian Bits.

Departures. The grid of 32 bits is finer than float32, so e_32 is all of the rest: 32 bits are float32. Digits
are kept to the range that makes a level's integer unique: no rounding error at a tie makes another of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kilobayes.random import Streams

WIDTHS = (2, 4, 8, 16, 32)
BETA, GAMMA, ZETA = 2.0 / 3.0, -0.1, 1.1
SHIFT = BETA * math.log(-GAMMA / ZETA)  # P(z > 0) = sigmoid(phi - SHIFT)
CLOSED = 0.34  # a gate is closed where P(z = 0) is at least this


def probability(logits: Tensor) -> Tensor:
    """P(z > 0), that a gate is not quite closed while training."""
    return torch.sigmoid(logits - SHIFT)


def drawn(logits: Tensor, streams: Streams) -> Tensor:
    """Gates of a training step in [0, 1]: hard concrete, differentiable in the logits."""
    normal = streams.normal(logits.detach())
    logistic = torch.special.log_ndtr(normal) - torch.special.log_ndtr(
        -normal
    )  # the logit of a uniform number
    return (torch.sigmoid((logistic + logits) / BETA) * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def decided(logits: Tensor) -> Tensor:
    """Gates after training, 0 or 1; the gradient passes through as that of P(z > 0)."""
    p = probability(logits)
    return ((1.0 - p < CLOSED).to(p) - p).detach() + p


def digits(x: Tensor, clip: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Steps ``(S, 1, 1)``, digits ``(S, n, m)`` and base of the widths from 2 to 16, coarsest first.

    Args:
        x: ``(S, n, m)``, within the range.
        clip: c ``(S, 1, 1)``.
    """
    rest, step, base = x, clip * (2.0 / 3.0), 3
    for width in WIDTHS[:-1]:
        if width > 2:
            base = 2 ** (width // 2) + 1
            step = step / base
        exact = rest / step
        most = (base - 1) // 2
        digit = exact + (exact.round().clamp(-most, most) - exact).detach()
        rest = rest - step * digit
        yield step, digit, base


def quantise(x: Tensor, clip: Tensor, gates: Tensor) -> Tensor:
    """x_q, in the shape of x.

    Args:
        x: ``(S, n, m)``.
        clip: c ``(S,)``, above zero.
        gates: z of 4, 8, 16 and 32 bits ``(S, 4)``; a closed gate closes the wider ones.
    """
    clip = clip.view(-1, 1, 1)
    x = torch.maximum(torch.minimum(x, clip), -clip)
    open_ = torch.cat([torch.ones_like(gates[:, :1]), gates], dim=1).cumprod(dim=1)[..., None, None]
    out = reached = torch.zeros_like(x)
    for index, (step, digit, _) in enumerate(digits(x, clip)):
        out = out + open_[:, index] * (step * digit)
        reached = reached + step * digit
    return out + open_[:, -1] * (x - reached)


def codes(x: Tensor, clip: Tensor, width: int) -> Tensor:
    """The integers ``(S, n, m)`` of x on the grid of ``width`` bits, from 2 to 16, within +-(2^(b-1) - 1)."""
    clip = clip.view(-1, 1, 1)
    code = torch.zeros_like(x, dtype=torch.int64)
    for (_, digit, base), reached in zip(digits(x.clamp(-clip, clip), clip), WIDTHS, strict=False):
        if reached <= width:
            code = code * base + digit.round().long()
    return code


def values(code: Tensor, clip: Tensor, width: int) -> Tensor:
    """What :func:`quantise` makes of an integer: the inverse of :func:`codes`, bit for bit."""
    clip = clip.view(-1, 1, 1)
    count = WIDTHS.index(width) + 1
    bases = [3] + [2 ** (w // 2) + 1 for w in WIDTHS[1:count]]
    found = []
    for base in reversed(bases):  # digits of a balanced positional system, the last one first
        digit = (code + (base - 1) // 2) % base - (base - 1) // 2
        code = (code - digit) // base
        found.append(digit)
    out, step = torch.zeros_like(code, dtype=clip.dtype), clip * (2.0 / 3.0)
    for index, (base, digit) in enumerate(zip(bases, reversed(found), strict=True)):
        step = step / base if index else step
        out = out + step * digit
    return out


def to_bytes(code: Tensor, width: int) -> Tensor:
    """Integers of ``width`` bits, or float32 numbers for 32, as bytes: the first in the lowest bits."""
    if width >= 16:
        return code.flatten().to(torch.int16 if width == 16 else torch.float32).contiguous().view(torch.uint8)
    many = 8 // width
    unsigned = code.flatten() + 2 ** (width - 1)
    padded = torch.nn.functional.pad(unsigned, (0, -len(unsigned) % many)).view(-1, many)
    return (padded << (width * torch.arange(many))).sum(dim=1).to(torch.uint8)


def from_bytes(packed: Tensor, width: int, count: int) -> Tensor:
    """The inverse of :func:`to_bytes`: ``count`` of them ``(count,)``."""
    if width >= 16:
        packed = packed.clone()  # a slice of a file may start anywhere, a view of it may not
        return packed.view(torch.float32) if width == 32 else packed.view(torch.int16).long()
    many = 8 // width
    unsigned = (packed.long()[:, None] >> (width * torch.arange(many))) % 2**width
    return unsigned.flatten()[:count] - 2 ** (width - 1)


def size_in_bytes(count: int, width: int) -> int:
    """Bytes of ``count`` numbers of ``width`` bits."""
    return -(-count * width // 8)
