r"""What can be averaged of several adapters' answers when a server tells only some probabilities.

.. math:: p(t) = \sum_k w_k p_k(t)

Servers list the most probable tokens alone. A token that one adapter lists and another does not has there a
probability between 0 and the least that is listed (and no more than what the list leaves over), so the
average of the listed ones is a lower bound, and the missing parts give the upper one. Entropies are over the
listed tokens and one event for all others: lower bounds too, of the entropy and of the mutual information,
since merging events can only lower either. Nats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Average:
    """One position.

    Attributes:
        low, high: bounds of the averaged probability of each listed token, most probable first.
        entropy, information: lower bounds of the entropy and the mutual information with the adapter.
        certain: whether no other token, listed or not, can be more probable than the first.
    """

    low: dict[str, float]
    high: dict[str, float]
    entropy: float
    information: float
    certain: bool


def average(lists: Sequence[Mapping[str, float]], weights: Sequence[float]) -> Average:
    """Averaged probabilities of one position.

    Args:
        lists: each adapter's listed tokens and their log-probabilities; at least one.
        weights: of the adapters; they add up to 1.
    """
    probs = [{token: math.exp(value) for token, value in own.items()} for own in lists]
    rests = [max(0.0, 1.0 - sum(own.values())) for own in probs]
    unseen = [min(rest, min(own.values(), default=1.0)) for own, rest in zip(probs, rests)]
    tokens = {token for own in probs for token in own}
    low = {t: sum(w * own.get(t, 0.0) for w, own in zip(weights, probs)) for t in tokens}
    missing = {t: sum(w * u for w, own, u in zip(weights, probs, unseen) if t not in own) for t in tokens}
    order = sorted(tokens, key=lambda t: (-low[t], t))
    high = {t: low[t] + missing[t] for t in order}
    rest = sum(w * r for w, r in zip(weights, rests))
    entropy = sum(_entr(p) for p in low.values()) + _entr(1.0 - sum(low.values()))
    own_entropy = sum(
        w * (sum(_entr(p) for p in own.values()) + _entr(r)) for w, own, r in zip(weights, probs, rests)
    )
    others = max([high[t] for t in order[1:]] + [min(rest, sum(w * u for w, u in zip(weights, unseen)))])
    return Average(
        {t: low[t] for t in order}, high, entropy, max(0.0, entropy - own_entropy), low[order[0]] >= others
    )


def forced(log_probs: Sequence[Sequence[float]], weights: Sequence[float]) -> tuple[list[float], list[float]]:
    """Log of the averaged probability of each token of a text, and the spread between adapters.

    Args:
        log_probs: of the same tokens under each adapter ``(K, T)``.

    Returns:
        Log-probabilities ``(T,)``, and weighted standard deviations of the probability ``(T,)``.
    """
    logs, spreads = [], []
    for values in zip(*log_probs, strict=True):
        each = [math.exp(value) for value in values]
        mean = sum(w * p for w, p in zip(weights, each))
        variance = sum(w * (p - mean) ** 2 for w, p in zip(weights, each))
        top = max(values)
        logs.append(top + math.log(sum(w * math.exp(v - top) for w, v in zip(weights, values))))
        spreads.append(math.sqrt(variance))
    return logs, spreads


def _entr(p: float) -> float:
    return -p * math.log(p) if p > 0 else 0.0
