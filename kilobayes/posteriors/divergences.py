r"""Divergences with closed forms, in nats, and expectations that go with them; float64 in, float64 out.

Differences of log-gamma functions cancel: in float32 they are lost at counts of a million.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dirichlet(log_alpha: Tensor, prior: float) -> Tensor:
    r"""KL of Dirichlet(alpha) from the symmetric Dirichlet(prior), over the last axis.

    .. math:: \ln\Gamma(\alpha_+) - \sum \ln\Gamma(\alpha_k) - \ln\Gamma(N \alpha_0) + N \ln\Gamma(\alpha_0)
              + \sum (\alpha_k - \alpha_0) (\psi(\alpha_k) - \psi(\alpha_+))
    """
    alpha = log_alpha.exp()
    whole, other = alpha.sum(dim=-1), torch.full_like(alpha, prior)
    ours = whole.lgamma() - alpha.lgamma().sum(dim=-1)
    theirs = other.sum(dim=-1).lgamma() - other.lgamma().sum(dim=-1)
    slopes = alpha.digamma() - whole.digamma()[..., None]
    return ours - theirs + ((alpha - other) * slopes).sum(dim=-1)


def wishart(log_scale: Tensor, degrees: Tensor) -> Tensor:
    r"""KL of Wishart(nu, diag(v) / nu) from Wishart(nu, I / nu), a term for each axis; v = exp(2 log_scale).

    .. math:: \tfrac{\nu}{2} (v - \ln v - 1)

    It is also that of the diagonals alone, which are independent gamma variables.
    """
    return 0.5 * degrees * excess(log_scale)


def normal(log_scale: Tensor, degrees: Tensor) -> Tensor:
    r"""Expected KL of N(0, w v) from N(0, 1), w chi-squared of ``degrees`` over them, v = exp(2 log_scale).

    .. math:: \tfrac12 (v - \ln v - 1 - \psi(\nu/2) - \ln(2/\nu))
    """
    return 0.5 * (excess(log_scale) - torch.digamma(degrees / 2) - torch.log(2 / degrees))


def excess(log_scale: Tensor) -> Tensor:
    """v - ln v - 1 for v = exp(2 log_scale): zero at v = 1, positive elsewhere."""
    return torch.expm1(2 * log_scale) - 2 * log_scale


def collision(log_alpha: Tensor) -> Tensor:
    r"""Expected sum of squares of Dirichlet(alpha) over the last axis: the chance that two picks agree.

    .. math:: \frac{\sum \alpha_k^2 + \alpha_+}{\alpha_+ (\alpha_+ + 1)}
    """
    share, log_whole = log_alpha.softmax(dim=-1), log_alpha.logsumexp(dim=-1)
    others = torch.sigmoid(-log_whole)  # 1 / (1 + alpha_+), without its overflow
    return share.square().sum(dim=-1) * (1 - others) + others
