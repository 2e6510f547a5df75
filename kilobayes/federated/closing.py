"""The end of a round: who is in it, whom they trust, and their mixtures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kilobayes import tree
from kilobayes.collaboration import rounds, updates
from kilobayes.collaboration.scheme import Scheme
from kilobayes.errors import KilobayesError
from kilobayes.types import Params

EXCESSIVE = 1e6


class Late(Exception):
    """Something for a round or phase that is not open: the sender must ask where things stand."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What a server runs.

    Args:
        users: who may take part.
        exchanges: the step of each round.
        scheme: of trust.
        average: what is averaged, as in :func:`kilobayes.collaboration.rounds.mix`.
        model: hosts the adapter.
        like: shapes of an update.
        fingerprint: of the base.
        reference: digest of the shared rows; "" where there are none.
        kinds: of the oracle, by user in order.
        least: users without whom a round is skipped.
        wait: seconds after the first update.
    """

    users: Sequence[str]
    exchanges: Sequence[int]
    scheme: Scheme
    average: str
    model: nn.Module
    like: rounds.Shapes
    fingerprint: str
    reference: str = ""
    kinds: Sequence[str] = ()
    least: int = 2
    wait: float = 600.0


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a round made.

    Attributes:
        theta: mixtures ``(U', ...)`` of those present.
        trust: W ``(U, U)`` of all users, those absent with themselves alone.
        how, lost: as in :class:`kilobayes.collaboration.updates.Mixed`.
    """

    theta: Params
    trust: Tensor
    how: str
    lost: Tensor


def checked(plan: Plan, hello: Mapping[str, Any]) -> int:
    """The number of training rows of a user who joins.

    Raises:
        KilobayesError: another base model, other shared rows, or no number.
    """
    rows = hello.get("rows")
    if not isinstance(rows, int) or isinstance(rows, bool) or not 0 < rows < 1 << 53:
        raise KilobayesError("rows must be the number of training rows", f"found {rows!r:.40}")
    if hello.get("fingerprint") != plan.fingerprint:
        raise KilobayesError(
            "the base model is not the server's",
            f"fingerprint {hello.get('fingerprint')!s:.12}, not {plan.fingerprint:.12}",
            "take the same files, and the same --dtype",
        )
    if hello.get("reference") != plan.reference:
        raise KilobayesError("the shared rows are not the server's", remedy="name its file: --reference")
    return rows


def excessive(update: Params) -> str:
    """Which numbers of an update are beyond what any training leaves, and would overflow; "" for none."""
    key = next((k for k, v in update.items() if bool((v.abs() > EXCESSIVE).any())), "")
    return f"{key} has numbers above {EXCESSIVE:g}" if key else ""


def sort(
    plan: Plan, theta: Mapping[str, Params], predictions: Mapping[str, Tensor]
) -> tuple[list[str], dict[str, str]]:
    """Users who are in the round, and why the others are not.

    Predictions must have one shape, that of most users.
    """
    accepted = rounds.accept({user: theta.get(user) for user in plan.users}, plan.like)
    names, refused = list(accepted.names), dict(accepted.refused)
    if plan.scheme.needs == "predictions" and names:
        shape, _ = Counter(tuple(predictions[user].shape) for user in names).most_common(1)[0]
        odd = [user for user in names if tuple(predictions[user].shape) != shape]
        refused |= {user: f"predictions {tuple(predictions[user].shape)}, not {shape}" for user in odd}
        names = [user for user in names if user not in odd]
    return names, refused


def outcome(
    plan: Plan,
    present: Sequence[str],
    theta: Params,
    predictions: Mapping[str, Tensor],
    losses: Mapping[str, Tensor],
    rows: Sequence[int],
) -> Outcome:
    """Trust among those present, and their mixtures.

    Args:
        theta: their updates ``(U', ...)``, in their order.
        rows: their numbers of training rows.

    Raises:
        KilobayesError: as trust and mixing do; mixtures that are not finite.
    """
    evidence: Tensor | None = None
    if plan.scheme.needs == "gram":
        evidence = updates.gram(plan.model, tree.plain(theta))
    elif plan.scheme.needs == "predictions":
        evidence = torch.cat([predictions[user] for user in present])
    elif plan.scheme.needs == "losses":
        evidence = torch.cat([losses[user] for user in present])
    elif plan.scheme.needs == "kinds":
        words = [plan.kinds[list(plan.users).index(user)] for user in present]
        evidence = torch.tensor([sorted(set(plan.kinds)).index(word) for word in words])
    trust = plan.scheme.trust(evidence, rows)
    try:
        mixed = rounds.mix(plan.model, theta, trust, plan.average)
    except torch.linalg.LinAlgError as error:
        raise KilobayesError("the updates cannot be averaged", str(error)[:200]) from None
    if not all(bool(value.isfinite().all()) for value in mixed.theta.values()):
        raise KilobayesError("the mixtures are not finite", "numbers that are too large")
    whole = rounds.everyone(trust, present, plan.users)
    return Outcome(mixed.theta, whole, mixed.how, mixed.lost)


def shown(lost: Tensor) -> float | None:
    """The largest number as JSON has it: None where it overflowed."""
    largest = float(lost.max())
    return round(largest, 6) if math.isfinite(largest) else None


def told(line: Mapping[str, Any], count: int) -> str:
    """A round's line in words."""
    head = f"round {line['round'] + 1} of {count}"
    if "skipped" in line:
        return f"{head}: skipped, {line['skipped']}"
    missing = "".join(f", without {user} ({why})" for user, why in line["refused"].items())
    size = sum(line["up_bytes"]) + sum(line["down_bytes"])
    return f"{head}: {len(line['users']) - len(line['refused'])} users{missing}; {size:,} bytes"
