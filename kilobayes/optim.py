r"""AdamW over a stack: every member has its own learning rate, gradient norm and clipping.

Loshchilov & Hutter, arXiv:1711.05101. With gradient g of member s at step t:

.. math:: m = \beta_1 m + (1 - \beta_1) g, \quad v = \beta_2 v + (1 - \beta_2) g^2, \quad
          \theta = (1 - \eta_s w)\,\theta - \eta_s \hat m / (\sqrt{\hat v} + \epsilon)

It is ours because a learning rate per member is a vector, which torch's optimisers do not take. For one
member it equals ``torch.optim.AdamW``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kilobayes.tree import map_params
from kilobayes.types import Params


@dataclass(frozen=True)
class AdamW:
    """The optimiser's constants.

    Args:
        weight_decay: w, decoupled, per unit of learning rate.
        beta1, beta2, epsilon: as in the paper.
        clip: largest gradient norm of a member over all its leaves; 0 never clips.
    """

    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip: float = 1.0


@dataclass(frozen=True, eq=False)
class AdamWState:
    """First and second moments, ``(S, ...)`` like the weights."""

    first: Params
    second: Params


def init(theta: Params) -> AdamWState:
    """Moments of zero for a stack."""
    zeros = map_params(torch.zeros_like, map_params(Tensor.detach, theta))
    return AdamWState(zeros, map_params(Tensor.clone, zeros))


def norms(gradients: Params) -> Tensor:
    """The gradient norm of each member over all leaves: ``(S,)``."""
    return torch.stack([g.flatten(1).square().sum(dim=1) for g in gradients.values()]).sum(dim=0).sqrt()


@torch.no_grad()
def step(
    config: AdamW,
    state: AdamWState,
    theta: Params,
    gradients: Params,
    rates: Tensor,
    count: int,
    groups: Mapping[str, float | Tensor],
) -> Tensor:
    """One step in place on ``theta`` and ``state``; returns the gradient norms before clipping ``(S,)``.

    Args:
        rates: learning rate of each member ``(S,)``; a member at 0 stays as it is, moments included.
        count: t, from 1.
        groups: factors of the learning rate by key, one or one a member ``(S,)``; 1 where absent.
    """
    norm = norms(gradients)
    scale = (config.clip / norm).clamp(max=1.0) if config.clip else torch.ones_like(norm)
    scale = torch.where(torch.isfinite(scale), scale, torch.ones_like(scale))
    bias1, bias2 = 1.0 - config.beta1**count, 1.0 - config.beta2**count
    for key, value in theta.items():
        across = (-1, *[1] * (value.dim() - 1))
        gradient = gradients[key] * scale.view(across)
        rate = (rates * groups.get(key, 1.0)).view(across)
        # a member that diverged has rate 0 and NaN gradients: its moments and weights must stay as they were
        alive = rates.view(across) != 0
        gradient = torch.where(alive, gradient, torch.zeros_like(gradient))
        first, second = state.first[key], state.second[key]
        moves = alive.to(first)
        first.lerp_(gradient, (1.0 - config.beta1) * moves)
        second.lerp_(gradient.square(), (1.0 - config.beta2) * moves)
        if config.weight_decay:
            value.mul_(1.0 - rate * config.weight_decay)
        value.sub_(rate / bias1 * first / (second.div(bias2).sqrt_().add_(config.epsilon)))
    return norm


def linear(progress: float, warmup: float) -> float:
    """Linear warm-up over a fraction of training, then linear decay to zero; relative to the peak."""
    if progress < warmup:
        return progress / warmup
    return max(0.0, (1.0 - progress) / max(1.0 - warmup, 1e-12))
