r"""Whom to average with: row-stochastic matrices of trust, Wagner, Fan and Jaggi, arXiv:2404.09753.

Row u says how much user u takes of each user's adapter, :math:`\theta_u \leftarrow \sum_v W_{uv} \theta_v`.
Every scheme is a softmax of scores with the users' numbers of rows n as a prior,

.. math:: W_{uv} = \frac{n_v \exp(s_{uv} / \tau)}{\sum_k n_k \exp(s_{uk} / \tau)},

so that users who cannot be told apart are averaged as FedAvg averages them (McMahan et al.,
arXiv:1602.05629), and a score counts for itself, however many users there are.

======================== ================================================== =============================
:func:`weight_trust`     s = cosine of the *updates*                        only adapters are exchanged
:func:`prediction_trust` s = - distance of predictions on shared rows       and predictions of these rows
:func:`validation_trust` s = - nats that v's adapter loses on u's own rows  every adapter to every user
======================== ================================================== =============================

Departures from the published code: there the first takes the mean cosine of the rows of factors A that each
user drew anew, so it measures the draw, and in the newest version skips the softmax (rows that do not sum to
one); the second looks at one token of each sequence; the third takes raw perplexities, whose softmax is
nearly one-hot, under a dropout that stays on. Here scores have units that do not depend on the number of
users, temperatures are arguments, and the rows that trust is measured on must not be those that results are
reported on: use splits of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kilobayes.errors import KilobayesError

DISTANCES = ("js", "l1")


def local(users: int) -> Tensor:
    """Everyone alone: the identity."""
    return torch.eye(users, dtype=torch.float64)


def fedavg(rows: Sequence[float] | Tensor) -> Tensor:
    """Everyone gets the mean over all, weighted by numbers of training rows ``(U,)``: arXiv:1602.05629.

    Raises:
        KilobayesError: a number below zero, or none above.
    """
    n = _rows(rows, len(rows))
    return (n / n.sum()).expand(len(n), -1).clone()


def oracle(kinds: Sequence[int] | Tensor, rows: Sequence[float] | Tensor | None = None) -> Tensor:
    r"""Averages among users whose data are of a kind, which nobody knows in practice.

    Args:
        kinds: the kind of each user ``(U,)``, or the share of each kind in its data ``(U, C)``, as the paper
            has them: :math:`W_{uv} \propto n_v (P P^\top)_{uv}`.
        rows: n ``(U,)``; None for all the same.
    """
    given = torch.as_tensor(kinds)
    p = given.double() if given.dim() == 2 else (given[:, None] == given.unique()[None]).double()
    return _normal(p @ p.mT * _rows(rows, len(p)))


def weight_trust(
    cosines: Tensor,
    *,
    temperature: float = 0.5,
    rows: Sequence[float] | Tensor | None = None,
    top: int | None = None,
    least: float | None = None,
) -> Tensor:
    """Trust in users whose updates point the same way.

    Args:
        cosines: of the updates ``(U, U)``, as :func:`cosines_of` makes them from inner products.
        temperature: tau; the paper has 1, at which eight users of nothing in common keep 0.28 of their own.
        rows: n ``(U,)``; None for all the same.
        top, least: keep a row's ``top`` best scores, and scores of at least ``least``; oneself is kept.
    """
    return softmax(cosines, temperature, rows=rows, top=top, least=least)


def cosines_of(gram: Tensor) -> Tensor:
    """Cosines from inner products ``(U, U)`` of updates, summed over sites; 0 beside an update of zero."""
    norms = gram.double().diagonal().clamp(min=0).sqrt()
    scale = torch.where(norms > 0, 1 / norms.clamp(min=1e-300), 0.0)
    out = (gram.double() * scale[:, None] * scale).clamp(-1, 1)
    return out.fill_diagonal_(1.0)


def prediction_trust(
    scores: Tensor,
    *,
    temperature: float = 0.05,
    distance: str = "js",
    keep: int | None = None,
    relative: bool = False,
    rows: Sequence[float] | Tensor | None = None,
    top: int | None = None,
    least: float | None = None,
) -> Tensor:
    r"""Trust in users who predict the same of shared rows, which need no labels.

    Args:
        scores: class scores of each user's adapter on the same rows ``(U, N, C)``; log-probabilities that are
            averaged over a posterior are such.
        temperature: tau, in nats for "js".
        distance: "js", the Jensen-Shannon divergence of the probabilities, mean over rows, from 0 to log 2
            nats; or "l1", the paper's: mean over rows of :math:`\sum_c |f_c - g_c|`.
        keep: before "l1", all scores of a row but the largest so many become 0; the paper has 100.
        relative: divide a row's distances by their sum, as the paper does (with tau 1/10): scale-free, but
            it depends on the number of users and enlarges differences that are none.
        rows: n ``(U,)``; None for all the same.
        top, least: as in :func:`weight_trust`, of scores, which are distances with a minus.

    Raises:
        KilobayesError: an unknown distance, or scores of another shape.
    """
    d = distances(scores, distance, keep)
    if relative:
        total = d.sum(dim=1, keepdim=True)
        d = torch.where(total > 0, d / total.clamp(min=1e-300), 0.0)
    return softmax(-d, temperature, rows=rows, top=top, least=least)


def distances(scores: Tensor, distance: str = "js", keep: int | None = None) -> Tensor:
    """Mean distances ``(U, U)`` of predictions ``(U, N, C)``; symmetric, zero on the diagonal."""
    if distance not in DISTANCES:
        raise KilobayesError(f"there is no distance {distance!r}", f"known: {', '.join(DISTANCES)}")
    if scores.dim() != 3:
        raise KilobayesError("predictions must be (users, rows, classes)", f"found {tuple(scores.shape)}")
    f = scores.double()
    if distance == "l1":
        if keep is not None and keep < f.shape[2]:
            best = f.topk(keep, dim=2)
            f = torch.zeros_like(f).scatter(2, best.indices, best.values)
        # a user at a time: memory of U N C, not of U^2 N C
        return torch.stack([(f - own).abs().sum(dim=2).mean(dim=1) for own in f])
    logs = f.log_softmax(dim=2)
    entropy = -(logs.exp() * logs).nansum(dim=2).mean(dim=1)  # a probability of zero gives nothing
    out = torch.zeros(len(f), len(f), dtype=torch.float64, device=f.device)
    for u, own in enumerate(logs):
        middle = torch.logaddexp(logs[u:], own) - math.log(2.0)
        mixed = -(middle.exp() * middle).nansum(dim=2).mean(dim=1)
        out[u, u:] = out[u:, u] = (mixed - (entropy[u:] + entropy[u]) / 2).clamp(min=0)
    return out.fill_diagonal_(0.0)


def validation_trust(
    losses: Tensor,
    *,
    temperature: float = 0.1,
    rows: Sequence[float] | Tensor | None = None,
    top: int | None = None,
    least: float | None = None,
) -> Tensor:
    """Trust in users whose adapters do well on one's own held-out rows.

    Args:
        losses: ``(U, U)``: entry u, v is the mean negative log-likelihood of v's adapter on u's rows, in nats
            a row or a token; infinite or not a number is no trust at all, as in an adapter that diverged.
        temperature: tau in nats; the paper divides perplexities by 1.
        rows: n ``(U,)``; None for all the same.
        top, least: as in :func:`weight_trust`, of scores, which are losses with a minus.
    """
    return softmax(-losses.double(), temperature, rows=rows, top=top, least=least)


def softmax(
    scores: Tensor,
    temperature: float,
    *,
    rows: Sequence[float] | Tensor | None = None,
    top: int | None = None,
    least: float | None = None,
) -> Tensor:
    """Row-stochastic ``(U, U)`` from scores, in double precision; what is not finite gets no trust.

    Raises:
        KilobayesError: scores that are not square, a temperature that is not above 0, ``top`` below 1, or a
            user who is left with nobody, not even itself.
    """
    s = scores.double()
    if s.dim() != 2 or s.shape[0] != s.shape[1]:
        raise KilobayesError("scores must be (users, users)", f"found {tuple(scores.shape)}")
    if not 0.0 < temperature < math.inf:
        raise KilobayesError("a temperature must be a number above 0", f"found {temperature}")
    if top is not None and top < 1:
        raise KilobayesError("top must be at least 1", f"found {top}")
    own = torch.eye(len(s), dtype=torch.bool, device=s.device)
    kept = s.isfinite()
    if least is not None:
        kept = kept & ((s >= least) | own)
    if top is not None and top < len(s):
        ranked = s.masked_fill(~kept, -math.inf).masked_fill(own & kept, math.inf)
        chosen = torch.zeros_like(kept).scatter(1, ranked.topk(top, dim=1).indices, True)
        kept = kept & chosen
    n = _rows(rows, len(s)).to(s.device)
    logits = torch.where(kept, s, 0.0) / temperature + n.log()
    logits = logits.masked_fill(~kept, -math.inf)
    lost = (logits == -math.inf).all(dim=1)
    if bool(lost.any()):
        raise KilobayesError(
            f"user {int(lost.nonzero()[0, 0])} is left with nobody to average with, not even itself",
            "no score in its row is a number",
            "check its rows and its adapter",
        )
    return logits.softmax(dim=1)


def among(trust: Tensor, present: Sequence[bool] | Tensor) -> Tensor:
    """Trust in a round that some miss: theirs goes to the others, and they keep what they have.

    A user who trusts none of those present keeps what it has, too.
    """
    here = torch.as_tensor(present, dtype=torch.bool, device=trust.device)
    kept = trust * here
    alone = ~here | (kept.sum(dim=1) == 0)
    eye = torch.eye(len(trust), dtype=trust.dtype, device=trust.device)
    return torch.where(alone[:, None], eye, kept / kept.sum(dim=1, keepdim=True).clamp(min=1e-300))


def _rows(rows: Sequence[float] | Tensor | None, users: int) -> Tensor:
    n = torch.ones(users, dtype=torch.float64) if rows is None else torch.as_tensor(rows).double()
    if n.shape != (users,) or not bool(n.isfinite().all()) or bool((n < 0).any()) or not bool(n.sum() > 0):
        raise KilobayesError(f"{users} users need as many numbers of rows, from 0 up", f"found {n.tolist()}")
    return n


def _normal(w: Tensor) -> Tensor:
    total = w.sum(dim=1, keepdim=True)
    if bool((total <= 0).any()):
        raise KilobayesError("a user shares nothing with anyone, not even itself", "a row of zeros")
    return w / total
