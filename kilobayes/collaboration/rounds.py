r"""A round as the server sees it: updates in, checked, trust, mixtures out. No files, no network.

An *update* is one flat dictionary of tensors with a leading axis of one user: the adapter's leaves, and with
``share="moments"`` also ``"site/leaf~mean"`` and ``"site/leaf~variance"`` of the posterior. A round is

1. :func:`accept` what came in, by user; what is not finite or of another shape counts as absent;
2. W of those present from :meth:`kilobayes.collaboration.scheme.Scheme.trust`;
3. :func:`mix` their updates, row v of the result for user v.

Absentees keep what they have and come back whenever they do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from kilobayes.collaboration import updates
from kilobayes.types import Params

MEAN, VARIANCE = "~mean", "~variance"
Shapes = Mapping[str, Sequence[int]]  # of one user's update, without the leading axis


@dataclass(frozen=True, eq=False)
class Accepted:
    """The updates of a round that can be mixed.

    Attributes:
        names: users present, in the order asked for.
        theta: their updates ``(U', ...)``.
        refused: why the others are not, by user: "absent", or what is wrong with what they sent.
    """

    names: list[str]
    theta: Params
    refused: dict[str, str]


def exchanges(steps: int, alone: int, every: int) -> list[int]:
    """Steps after which users exchange: after ``alone`` steps, then ``every`` so many, and after the last.

    Raises:
        KilobayesError: no such step before the end, or ``every`` below 1.
    """
    raise NotImplementedError


def shapes(update: Params) -> dict[str, tuple[int, ...]]:
    """Shapes of one user's update, for :func:`wrong`."""
    return {key: tuple(value.shape[1:]) for key, value in update.items()}


def wrong(update: Params, like: Shapes) -> str:
    """What is wrong with one user's update, ``(1, ...)``, in words; "" where nothing is."""
    raise NotImplementedError


def accept(sent: Mapping[str, Params | None], like: Shapes) -> Accepted:
    """Sort a round's updates into those that are mixed and those that are not.

    Args:
        sent: by user; None for who is absent.
        like: as :func:`shapes` of any good update, such as the start.
    """
    raise NotImplementedError


def mix(model: nn.Module, theta: Params, weights: Tensor, how: str = "auto") -> updates.Mixed:
    """Everybody's next update ``(U, ...)`` from all updates ``(U, ...)`` and trust ``(U, U)``.

    Args:
        model: hosts the adapter; its own leaves do not matter.
        how: "auto", "updates" or "leaves", as in :func:`kilobayes.collaboration.updates.average`.

    Raises:
        KilobayesError: as :func:`kilobayes.collaboration.updates.average`; moments of an adapter whose leaves
            cannot be averaged.
    """
    raise NotImplementedError


def everyone(trust: Tensor, present: Sequence[str], names: Sequence[str]) -> Tensor:
    """W of all users from that of those present: the others keep what they have."""
    raise NotImplementedError


def bytes_of(update: Params | Tensor) -> int:
    """Bytes of an update, or of predictions, as sent."""
    raise NotImplementedError
