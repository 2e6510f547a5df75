"""Updates as matrices, and the refusal to make one of what is none."""

from __future__ import annotations

import torch
from torch import Tensor

from kilobayes.errors import KilobayesError
from kilobayes.types import LowRank, Operator, delta


def require_linear(name: str, path: str, operator: Operator) -> None:
    """Refuse an operator that says of itself that it is no linear map, whatever its weights are.

    It says so by a class attribute ``nonlinear``, the reason; another, ``instead``, may say what to do.

    Raises:
        KilobayesError: it does.
    """
    if reason := getattr(operator, "nonlinear", ""):
        remedy = getattr(operator, "instead", "serve it unmerged")
        raise _refusal(name, f"{reason} ({type(operator).__name__} at {path})", remedy)


@torch.no_grad()
def update_matrix(name: str, path: str, operator: Operator, d_in: int) -> Tensor:
    """The stack of updates ``(S, d_out, d_in)``, after a look at whether they do what the operator does.

    Raises:
        KilobayesError: the operator is not linear.
    """
    require_linear(name, path, operator)
    update = delta(operator, d_in)
    if not isinstance(operator, LowRank):
        probe = torch.linspace(-1.0, 1.5, d_in, dtype=update.dtype, device=update.device)
        probe = probe.expand(len(update), 1, d_in)
        given, wanted = operator(probe), probe @ update.mT
        if (given - wanted).norm() > 0.01 * wanted.norm() + 1e-6:
            raise _refusal(name, f"a {type(operator).__name__} at {path}", "serve it unmerged")
    return update


def _refusal(name: str, found: str, remedy: str) -> KilobayesError:
    return KilobayesError(
        f"adapter {name!r} is not a linear map, so no weight does what it does", found, remedy
    )
