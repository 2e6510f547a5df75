r"""How the next token is chosen from averaged probabilities, and when generation ends.

.. math:: q_v \propto p_v^{1/T} \text{ over the tokens kept}, \qquad p = \frac1S \sum_s \text{softmax}(z_s)

With one member this is ``softmax(z / T)``; top-k and top-p, in this order and after the temperature, keep
what transformers' warpers keep. Temperature 0 takes the most probable token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kilobayes.errors import KilobayesError


@dataclass(frozen=True)
class Sampling:
    """Settings of a generation.

    Attributes:
        max_new_tokens: of a sequence, the one that stops it included.
        temperature: 0 takes the most probable token.
        top_k: keep so many of the most probable tokens; 0 keeps all.
        top_p: keep the fewest most probable tokens that together reach this probability; 1 keeps all.
        stop_entropy: end a sequence, without the token, where the entropy of the averaged probabilities is
            above so many nats.
        stop_information: likewise for the mutual information.
        alternatives: how many of the most probable tokens to report at each position.

    Raises:
        KilobayesError: a value out of its range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop_entropy: float | None = None
    stop_information: float | None = None
    alternatives: int = 5

    def __post_init__(self) -> None:
        least = {"max_new_tokens": 1, "temperature": 0, "top_k": 0, "alternatives": 0}
        least |= {"stop_entropy": 0, "stop_information": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and not low <= value < math.inf:
                raise KilobayesError(f"{_flag(name)} must be at least {low}", f"found {value}")
        if not 0 < self.top_p <= 1:
            raise KilobayesError(
                "--top-p must be above 0 and at most 1", f"found {self.top_p}", "as in --top-p 0.9"
            )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def shaped(probs: Tensor, sampling: Sampling) -> Tensor:
    """The distribution ``(R, V)`` that tokens are drawn from, of averaged probabilities ``(R, V)``.

    The temperature is above 0.
    """
    if sampling.temperature != 1.0:
        probs = (probs.log() / sampling.temperature).softmax(dim=-1)
    if 0 < sampling.top_k < probs.shape[-1]:
        least = probs.topk(sampling.top_k, dim=-1).values[:, -1:]
        probs = probs.masked_fill(probs < least, 0.0)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    if sampling.top_p < 1.0:
        ordered, order = probs.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # what the more probable ones add up to
        kept = ordered.masked_fill(before >= sampling.top_p, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, order, kept)
    return probs / probs.sum(dim=-1, keepdim=True)


def pick(probs: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """A token for each row ``(R,)``: the most probable one, or the one that a uniform number falls on.

    Args:
        probs: averaged probabilities ``(R, V)``.
        uniform: numbers in [0, 1) ``(R,)``; unused at temperature 0.
    """
    if sampling.temperature == 0:
        return probs.argmax(dim=-1)
    cumulative = shaped(probs, sampling).double().cumsum(dim=-1)
    at = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, at, right=True)[:, 0]  # never one of probability zero
    return found.clamp(max=probs.shape[-1] - 1)
