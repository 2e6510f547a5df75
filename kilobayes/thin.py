r"""A saved posterior made smaller: fewer directions, or a few draws in the place of a distribution.

SWAG's deviations D ``(P, R)`` of a member stand for the covariance :math:`D D^\top / 2(R - 1)`. The best of
rank k comes from the k leading eigenvectors V of the ``R x R`` matrix :math:`D^\top D`, taken over all leaves
together:

.. math:: D_k = \sqrt{\tfrac{k - 1}{R - 1}}\; D V_k, \qquad
          D_k D_k^\top / 2(k - 1) = D V_k V_k^\top D^\top / 2(R - 1)

(Eckart and Young, 1936). The average and the diagonal stay. Any posterior whose draws are weights can become
an ensemble of n draws from it, which it predicts as it did with n samples; one alone is the mean.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import save

from kilobayes import tree
from kilobayes.errors import KilobayesError
from kilobayes.posteriors import SWAG, Ensemble, Point, Scale, Temperature, ask
from kilobayes.posteriors.point import PointState
from kilobayes.posteriors.swag import SWAGState
from kilobayes.posteriors.wrapping import Wrapping
from kilobayes.protocols import Predicts, Transforms
from kilobayes.types import Params, Posterior

Sized = tuple[Posterior, Any]


def stored(posterior: Posterior, state: Any) -> int:
    """Bytes of a posterior and its mean as files: what a run needs beside its base."""
    parts: tuple[Params, ...] = (tree.flatten_state(state), posterior.mean(state))
    return sum(len(save({k: v.contiguous().cpu() for k, v in part.items()})) for part in parts)


def thin(
    posterior: Posterior,
    state: Any,
    limit: int,
    gen: torch.Generator,
    how: str = "auto",
    *,
    size: Callable[[Posterior, Any], int] = stored,
) -> Sized:
    """The posterior and its state, within a budget; as they are where they fit.

    Temperatures, and a :class:`Scale` of class scores, stay around what becomes smaller; they are not fitted
    again.

    Args:
        limit: bytes.
        gen: where draws come from.
        how: "rank" lowers the rank of SWAG, at last to its diagonal; "samples" keeps draws, or fewer members
            of an ensemble; "auto" is the first where it suffices, and else, or where members have no
            spread, the second.
        size: what counts the bytes of a posterior and its state.

    Raises:
        KilobayesError: another ``how``, a budget below what the smallest needs, or a posterior that cannot be
            made smaller in that way.
    """
    known = ("rank", "samples", "auto")
    if how not in known:
        raise KilobayesError(f"cannot thin by {how!r}", f"known: {', '.join(known)}", "as in --how auto")
    if size(posterior, state) <= limit:
        return posterior, state
    still = posterior.support(state) is not None  # where draws do not differ, a rank has no use
    if how == "rank" or (how == "auto" and not still):
        try:
            return _by_rank(posterior, state, limit, size)
        except KilobayesError:
            if how == "rank":
                raise
    return _by_samples(posterior, state, limit, gen, size)


def _by_rank(posterior: Posterior, state: Any, limit: int, size: Callable[..., int]) -> Sized:
    inner = next((p for p in ask.chain(posterior) if isinstance(p, SWAG)), None)
    if inner is None or not inner.rank:
        raise KilobayesError(
            f"{posterior!r} has no rank to lower", "only SWAG with deviations has", "as in --how samples"
        )
    least = lowered(posterior, state, 0)
    for rank in range(inner.rank - 1, 1, -1):
        smaller = lowered(posterior, state, rank)
        if size(*smaller) <= limit:
            return smaller
    if (needed := size(*least)) > limit:
        raise KilobayesError(
            f"{limit:,} bytes do not hold this posterior's diagonal",
            f"it needs {needed:,}",
            "as in --how samples",
        )
    return least


def lowered(posterior: Any, state: Any, rank: int) -> Sized:
    """The same around SWAG of a lower rank: 0 for its diagonal alone, else at least 2."""
    if not isinstance(posterior, SWAG):
        base, inner = lowered(posterior.base, posterior.inner(state), rank)
        return dataclasses.replace(posterior, base=base), posterior.around(state, inner)
    own: SWAGState = state
    first = next(iter(own.deviations.values()))
    columns = first.shape[1]
    if rank == 0:
        kept = {k: v[:, :0].clone() for k, v in own.deviations.items()}
    elif rank < columns:
        gram = torch.zeros(len(first), columns, columns, dtype=torch.float64)
        for value in own.deviations.values():
            flat = value.double().flatten(2)
            gram += flat @ flat.mT
        leading = torch.linalg.eigh(gram).eigenvectors[:, :, -rank:] * math.sqrt((rank - 1) / (columns - 1))
        kept = {
            k: torch.einsum("mrk,mr...->mk...", leading, v.double()).to(v) for k, v in own.deviations.items()
        }
    else:
        kept = own.deviations
    return dataclasses.replace(posterior, rank=rank), dataclasses.replace(own, deviations=kept)


def _by_samples(
    posterior: Posterior, state: Any, limit: int, gen: torch.Generator, size: Callable[..., int]
) -> Sized:
    smaller = drawn(posterior, state, 1, gen)
    if (one := size(*smaller)) > limit:
        raise KilobayesError(
            f"{limit:,} bytes do not hold one member", f"one takes {one:,}", f"as in --bytes {one}"
        )
    each = tree.total_bytes([*tree.flatten_state(smaller[1]).values(), *smaller[0].mean(smaller[1]).values()])
    start = gen.get_state()
    for n in range(min(posterior.support(state) or limit, limit // each), 1, -1):  # files have headers, too
        larger = drawn(posterior, state, n, gen.set_state(start))
        if size(*larger) <= limit:
            return larger
    return smaller


def drawn(posterior: Posterior, state: Any, n: int, gen: torch.Generator) -> Sized:
    """An ensemble of n draws, or the first member's mean for one, inside what changes class scores.

    Raises:
        KilobayesError: the posterior does not predict by running sampled weights, or changes scores in a way
            that draws cannot keep.
    """
    around = _around(posterior, state)
    mean = posterior.mean(state)
    theta = posterior.sample(state, n, gen) if n > 1 else tree.member(mean, 0)
    small: Posterior = Ensemble(Point(), members=n) if n > 1 else Point()
    inner: Any = PointState(tree.clone(theta), {})
    who = tree.spread(tree.size(mean), n)
    for wrapper, old in reversed(around):
        small = dataclasses.replace(wrapper, base=small)
        numbers = {f.name: getattr(old, f.name)[who] for f in dataclasses.fields(old) if f.name != "inner"}
        inner = dataclasses.replace(old, inner=inner, **numbers)
    return small, inner


def _around(posterior: Any, state: Any) -> list[tuple[Any, Any]]:
    """The wrappers that change scores, from the outside in, with their states."""
    found = []
    while hasattr(posterior, "base"):
        within = isinstance(posterior, Scale) and posterior.of_scores(state)
        if within and ask.members(posterior.base) == 1 and len(state.factor) > 1:
            raise _stays(posterior, "it scales the scores of each member apart")
        if within or isinstance(posterior, Temperature):
            found.append((posterior, state))
        elif type(posterior).transform is not Wrapping.transform and not isinstance(posterior, Scale):
            raise _stays(posterior, "it changes class scores")
        posterior, state = posterior.base, posterior.inner(state)
    if isinstance(posterior, Predicts) and getattr(posterior, "linearised", True):
        raise _stays(posterior, "it predicts in its own way, not by running sampled weights")
    if getattr(posterior, "masks", False):
        raise _stays(posterior, "its draws differ in masks of tokens, not in weights")
    if isinstance(posterior, Transforms):
        raise _stays(posterior, "it changes class scores")
    return found


def _stays(posterior: Any, why: str) -> KilobayesError:
    return KilobayesError(f"{type(posterior).__name__} cannot become a few draws", why)
