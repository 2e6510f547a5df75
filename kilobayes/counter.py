r"""Random numbers that are a function of their index: nothing is held, any of them can be had again.

The i-th number of a key k is SplitMix64's (Steele, Lea and Flood 2014), started from the mixed key,

.. math:: h_i(k) = m(m(k) + (i + 1)\, \gamma), \qquad u_i = \lfloor h_i / 2^{40} \rfloor / 2^{24},

in integers modulo 2^64, where m is Stafford's 13th variant of the 64-bit finaliser. Keys are mixed so that
neighbouring keys do not walk through the same states. Integer arithmetic alone: the same bits on every device
and for every way of cutting the range. No generator, global or other, is read or moved.
"""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
CACHED, WIDE = (
    1 << 14,
    1 << 24,
)  # numbers made at a time: what stays in a core's cache; what fills an accelerator


def signed(value: int) -> int:
    """The integer modulo 2^64 as torch's int64 holds it."""
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >> 63 else value


def mix(bits: Tensor) -> Tensor:
    """m, a bijection of 64-bit integers held in int64; any shape."""

    def fold(z: Tensor, shift: int) -> Tensor:
        return z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))  # >> repeats the sign bit: masked off

    return fold(fold(fold(bits, 30) * signed(FIRST), 27) * signed(SECOND), 31)


def key(*parts: int) -> int:
    """One key of several integers, of any size and sign; (1, 2) and (2, 1) differ."""
    mixed = torch.zeros((), dtype=torch.int64)
    for part in parts:
        mixed = mix(mixed + signed(GOLDEN)) ^ signed(part)
    return int(mixed)


def uniforms(index: Tensor, keys: Tensor) -> Tensor:
    """The numbers of given indices in the streams of given keys.

    Args:
        index: int64, which numbers.
        keys: int64 on the same device, which streams; the two are broadcast against each other.

    Returns:
        float32 in [0, 1), multiples of 2^-24, which are exact.
    """
    bits = mix(mix(keys) + (index + 1) * signed(GOLDEN))
    return ((bits >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def uniform(seed: int, start: int, count: int, device: torch.device | str | None = None) -> Tensor:
    """Numbers ``start`` to ``start + count - 1`` of the stream of one key: ``(count,)`` float32 in [0, 1).

    Args:
        seed: the key; an integer of any size, taken modulo 2^64.
        start: index of the first number.
        count: how many.
        device: where they are made.
    """
    out = torch.empty(count, dtype=torch.float32, device=device)
    keys = torch.tensor(signed(seed), device=device)
    chunk = CACHED if out.device.type == "cpu" else WIDE
    for first in range(0, count, chunk):
        last = min(first + chunk, count)
        index = torch.arange(start + first, start + last, device=device)
        out[first:last] = uniforms(index, keys)
    return out
