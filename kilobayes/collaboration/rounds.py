r"""A round as the server sees it: updates in, checked, trust, mixtures out. No files, no network.

An *update* is one flat dictionary of tensors with a leading axis of one user: the adapter's leaves, and with
``share="moments"`` also ``"site/leaf~mean"`` and ``"site/leaf~variance"`` of the posterior. A round is

1. :func:`accept` what came in, by user; what is not finite or of another shape counts as absent;
2. W of those present from :meth:`kilobayes.collaboration.scheme.Scheme.trust`;
3. :func:`mix` their updates, row v of the result for user v.

Absentees keep what they have and come back whenever they do.

Moments are those of the mixture of the users' Gaussians,

.. math:: \bar\mu_u = \sum_v W_{uv} \mu_v, \qquad
          \bar\sigma^2_u = \sum_v W_{uv} \bigl(\sigma^2_v + (\mu_v - \bar\mu_u)^2\bigr),

so what trusted users disagree about becomes doubt. A variance belongs to a leaf, not to an update: moments
need an adapter whose leaves may be averaged (LoRA-XS, MoRA), or ``how="leaves"``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kilobayes import gauge, host, tree
from kilobayes.collaboration import updates
from kilobayes.errors import KilobayesError
from kilobayes.types import Params

MEAN, VARIANCE = "~mean", "~variance"
Shapes = Mapping[str, Sequence[int]]  # of one user's update, without the leading axis


@dataclass(frozen=True, eq=False)
class Accepted:
    """The updates of a round that can be mixed.

    Attributes:
        names: users present, in the order asked for.
        theta: their updates ``(U', ...)``; empty where nobody is present.
        refused: why the others are not, by user: "absent", or what is wrong with what they sent.
    """

    names: list[str]
    theta: Params
    refused: dict[str, str]


def exchanges(steps: int, alone: int, every: int) -> list[int]:
    """Steps after which users exchange: after ``alone`` steps, then ``every`` so many, and after the last.

    Raises:
        KilobayesError: fewer than one step, or ``every`` below 1, or ``alone`` below 0.
    """
    if steps < 1 or every < 1 or alone < 0:
        raise KilobayesError(
            "users exchange every so many of their steps", f"{steps} steps, {alone} alone, every {every}"
        )
    return sorted({*range(alone or every, steps + 1, every), steps})


def shapes(update: Params) -> dict[str, tuple[int, ...]]:
    """Shapes of one user's update, for :func:`wrong`."""
    return {key: tuple(value.shape[1:]) for key, value in update.items()}


def wrong(update: Params, like: Shapes) -> str:
    """What is wrong with one user's update, ``(1, ...)``, in words; "" where nothing is."""
    if odd := sorted(set(update) ^ set(like)):
        return f"{odd[0]} is {'missing' if odd[0] in like else 'not asked for'}"
    for key in sorted(like):
        value = update[key]
        if tuple(value.shape) != (1, *like[key]):
            return f"{key} is {tuple(value.shape)}, not {(1, *like[key])}"
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            return f"{key} holds what is no number"
        if key.endswith(VARIANCE) and bool((value < 0).any()):
            return f"{key} is negative"
    return ""


def accept(sent: Mapping[str, Params | None], like: Shapes) -> Accepted:
    """Sort a round's updates into those that are mixed and those that are not.

    Args:
        sent: by user; None for who is absent.
        like: as :func:`shapes` of any good update, such as the start.
    """
    refused = {name: "absent" if update is None else wrong(update, like) for name, update in sent.items()}
    names = [name for name, why in refused.items() if not why]
    found = [update for name, update in sent.items() if update is not None and not refused[name]]
    sorted_ = [{key: update[key] for key in sorted(like)} for update in found]
    theta = tree.concatenate(sorted_) if found else {}
    return Accepted(names, theta, {name: why for name, why in refused.items() if why})


def by_user(theta: Params, names: Sequence[str], alive: Sequence[bool]) -> dict[str, Params | None]:
    """Updates ``(U, ...)`` of one process as :func:`accept` takes them; of who diverged, none."""
    return {name: tree.member(theta, place) if alive[place] else None for place, name in enumerate(names)}


def mix(model: nn.Module, theta: Params, weights: Tensor, how: str = "auto") -> updates.Mixed:
    """Everybody's next update ``(U, ...)`` from all updates ``(U, ...)`` and trust ``(U, U)``.

    An average of LoRA's updates comes back in factors turned from each user's own, as
    :func:`kilobayes.gauge.towards` has it.

    Args:
        model: hosts the adapter; its own leaves do not matter.
        how: "auto", "updates" or "leaves", as in :func:`kilobayes.collaboration.updates.average`.

    Raises:
        KilobayesError: as :func:`kilobayes.collaboration.updates.average`; moments of an adapter whose leaves
            cannot be averaged.
    """
    device = next(model.parameters()).device
    found = updates.average(model, {k: v.to(device) for k, v in tree.plain(theta).items()}, weights, how=how)
    out = {key: value.cpu() for key, value in found.theta.items()}
    if found.how == "updates":  # LoRA's alone
        for key in [k for k in out if k.endswith("/A")]:
            other = f"{key[:-2]}/B"
            out[key], out[other] = gauge.towards(out[key], out[other], theta[key])
    means = {key.removesuffix(MEAN): value for key, value in theta.items() if key.endswith(MEAN)}
    if means and found.how != "leaves":
        raise KilobayesError(
            f"variances of the leaves of {host.method(model)!r} have no average",
            "its update is not linear in its leaves",
            "take LoRAXS or MoRA, or average: leaves, or share: mean",
        )
    mixed = updates.mix(means, weights)
    out |= {f"{key}{MEAN}": value for key, value in mixed.items()}
    for key, each in means.items():
        apart = (each[None] - mixed[key][:, None]).double().square()
        second = theta[f"{key}{VARIANCE}"].double() + apart
        out[f"{key}{VARIANCE}"] = torch.einsum("vu,vu...->v...", weights.to(second), second).to(each)
    return replace(found, theta=out)


def drawn(update: Params, n: int, gen: torch.Generator) -> Params:
    """Draws ``(V n, ...)`` of users' moments ``(V, ...)``, all of the same noise; the leaves where n is 1."""
    theta = tree.plain(update)
    if n == 1:
        return theta
    out = {}
    for key in sorted(theta):
        mean, deviation = update[f"{key}{MEAN}"], update[f"{key}{VARIANCE}"].sqrt()
        noise = torch.randn(n, *mean.shape[1:], generator=gen).to(mean)
        out[key] = (mean[:, None] + deviation[:, None] * noise).flatten(0, 1)
    return out


def everyone(trust: Tensor, present: Sequence[str], names: Sequence[str]) -> Tensor:
    """W of all users from that of those present: the others keep what they have."""
    out = torch.eye(len(names), dtype=trust.dtype)
    if present:
        at = torch.tensor([list(names).index(name) for name in present])
        out[at[:, None], at] = trust
    return out


def bytes_of(update: Params | Tensor) -> int:
    """Bytes of an update, or of predictions, as sent."""
    return tree.total_bytes([update] if isinstance(update, Tensor) else update.values())


def traffic(needs: str, update: int, users: int, predictions: int = 0) -> tuple[int, int]:
    """Bytes that a user sends and gets in a round, where everything is sent as it is.

    Args:
        needs: of :class:`~kilobayes.collaboration.scheme.Scheme`.
        update: bytes of a user's update.
        predictions: bytes of a user's predictions.
    """
    extra = {"predictions": (predictions, 0), "losses": (8 * users, (users - 1) * update)}
    up, down = extra.get(needs, (0, 0))
    return update + up, update + down
