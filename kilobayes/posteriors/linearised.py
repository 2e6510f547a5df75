r"""Scores linear in the weights, and the prior's precision: what Laplace does with a curvature."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kilobayes.posteriors.curvature import Curvature
from kilobayes.protocols import Jacobian
from kilobayes.search import lowest, vertex
from kilobayes.types import Params

GRID = torch.logspace(-3, 7, 31, dtype=torch.double)  # precisions of the prior, nats per squared weight
TEMPERATURES = [cell * math.log(2) / 2 for cell in range(-6, 7)]  # their logarithms


def hessian_root(scores: Tensor) -> Tensor:
    r"""V ``(B, C, C - 1)`` with :math:`V V^\top = \operatorname{diag}(p) - p p^\top`, of scores ``(B, C)``.

    diag(sqrt p) times an orthonormal basis of what is orthogonal to sqrt p: all but the last column of the
    reflection that takes sqrt p to the last axis.
    """
    root = scores.double().softmax(dim=-1).sqrt()
    normal = root.clone()
    normal[:, -1] += 1.0
    reflection = normal[:, :, None] * normal[:, None, :-1] / normal[:, None, -1:]
    eye = torch.eye(root.shape[1], dtype=root.dtype, device=root.device)[:, :-1]
    return (root[:, :, None] * (eye - reflection)).to(scores)


def differences(scores: Tensor) -> Tensor:
    """``(B, C, C - 1)``: every score less the last, since softmax does not see what all have in common."""
    eye = torch.eye(scores.shape[1] - 1, dtype=scores.dtype, device=scores.device)
    return torch.cat([eye, -torch.ones_like(eye[:1])]).expand(len(scores), -1, -1)


def draws(
    found: Curvature, stream: Iterator[Jacobian], precisions: Tensor, n: int, rows: int, gen: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows ``(B,)`` and draws of their linearised scores ``(G, n, B, C)``, for G precisions of the prior.

    Args:
        stream: derivatives of :func:`differences`.
        rows: of the stream in all. Noise is drawn for all at once, so that batches do not matter; it is
            the same for every precision.
    """
    noise = torch.empty(0)
    for batch in stream:
        covariance = found.to(batch.logits.device).covariances(batch.gradients, precisions).cpu()
        size = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        jitter = 1e-9 * size.clamp(min=1e-30) * torch.eye(covariance.shape[-1], dtype=torch.double)
        root = torch.linalg.cholesky(covariance + jitter)
        if not len(noise):
            noise = torch.randn(n, rows, len(root[0, 0]), generator=gen)
        step = torch.einsum("gbij,nbj->gnbi", root, noise[:, batch.rows].double())
        yield batch.rows, (batch.logits.double().cpu() + torch.nn.functional.pad(step, (0, 1))).float()


def validated(batches: Iterator[tuple[Tensor, Tensor]], labels: Tensor, tempered: bool) -> float:
    """The precision of lowest NLL of the averaged probabilities: on the grid, refined by a parabola.

    Args:
        batches: of :func:`draws`, over the whole grid.
        tempered: after the best temperature for each precision, not as they are.
    """
    temperatures = TEMPERATURES if tempered else [0.0]
    total = torch.zeros(len(GRID), len(temperatures), dtype=torch.double)
    for rows, scores in batches:
        index = labels[rows].to(scores.device).expand(*scores.shape[:2], -1)[..., None]
        for at, log_t in enumerate(temperatures):
            picked = (scores / math.exp(log_t)).log_softmax(dim=-1).gather(-1, index)[..., 0]
            total[:, at] -= (picked.double().logsumexp(dim=1) - math.log(scores.shape[1])).sum(dim=1)
    best = [vertex(temperatures, row)[1] for row in total.tolist()]
    return math.exp(vertex(GRID.log().tolist(), best)[0])


def evidence(found: Curvature, distance: float, precision: float) -> float:
    r"""Log marginal likelihood less :math:`\log p(D \mid \theta^*)`, nats.

    Args:
        distance: squared, of the weights from the centre of the prior.
    """
    return -0.5 * (precision * distance + found.log_determinant(precision))


def most_evident(found: Curvature, distance: float) -> float:
    """The precision of largest :func:`evidence`: a grid, then Brent's method in the best cell."""
    return math.exp(lowest(lambda x: -evidence(found, distance, math.exp(x)), GRID.log().tolist()))


def distance(theta: Params, center: Params) -> Tensor:
    """Squared distance ``(S,)`` of the leaves that ``center`` has from it."""
    parts = [(theta[key] - value).square().flatten(1).sum(dim=1) for key, value in sorted(center.items())]
    return torch.stack(parts).sum(dim=0)
