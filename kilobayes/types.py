"""The protocols at which adapters, posteriors, tasks and the training loop meet.

``Params`` is a flat dictionary of tensors with keys ``"site/leaf"`` (``"*/leaf"`` is shared by all sites).
Every tensor has a leading axis S: a *stack* of S adapters over one frozen base, run in one forward. A stack
is posterior samples, ensemble members, the seeds and learning rates of a sweep, users, or examples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

Params = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Site:
    """One linear map of the frozen base that carries an adapter.

    Attributes:
        name: module path in the base model, such as ``bert.encoder.layer.0.attention.self.query``.
        d_in, d_out: input and output width, whatever the storage layout (``Conv1D`` included).
        weight: gives the dequantised base weight ``(d_out, d_in)``; computed only when called.
    """

    name: str
    d_in: int
    d_out: int
    weight: Callable[[], Tensor]


@runtime_checkable
class Operator(Protocol):
    """A stack of S maps, ``(S, N, d_in) -> (S, N, d_out)``, held in a dataclass whose fields are tensors.

    One that is not linear says why in a class attribute ``nonlinear``, and is never merged.
    """

    def __call__(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class LowRank:
    """The update ``delta W = B A`` of each member; any scale is already in B.

    Attributes:
        A: ``(S, r, d_in)``.
        B: ``(S, d_out, r)``.
    """

    A: Tensor
    B: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return torch.bmm(torch.bmm(x, self.A.mT), self.B.mT)


def delta(operator: Operator, d_in: int) -> Tensor:
    """The stack of update matrices ``(S, d_out, d_in)``: the operator applied to the identity.

    So merged equals unmerged by construction.
    """
    if isinstance(operator, LowRank):
        return torch.bmm(operator.B, operator.A)
    first = next(iter(vars(operator).values()))
    eye = torch.eye(d_in, dtype=first.dtype, device=first.device)
    return operator(eye.expand(first.shape[0], d_in, d_in)).mT


def map_tensors(operator: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a dataclass of tensors with ``fn`` applied to each of them."""
    changed = {
        f.name: fn(value)
        for f in dataclasses.fields(operator)
        if isinstance(value := getattr(operator, f.name), Tensor)
    }
    return dataclasses.replace(operator, **changed)


@runtime_checkable
class Adapter(Protocol):
    """A compact parametrisation of the updates: a frozen dataclass whose repr is its configuration.

    What else an adapter may offer is in :mod:`kilobayes.parametrise`, which asks for it by name.
    """

    def init(self, sites: list[Site], constants: Params, stack: int, gen: torch.Generator) -> Params:
        """Trainable leaves ``(stack, ...)`` in float32 for all sites at once, from the frozen constants."""
        ...

    def build(self, params: Params, constants: Params, site: Site) -> Operator:
        """Pure: the leaves of one site (keys without the site) in, the operator out."""
        ...


@dataclass(frozen=True)
class Progress:
    """Where training stands, as seen by a posterior after an optimiser step.

    Attributes:
        step: optimiser steps done, from 1.
        steps: optimiser steps in all.
        steps_per_epoch: optimiser steps of one epoch.
        rows: training rows N, for priors relative to a mean loss.
    """

    step: int
    steps: int
    steps_per_epoch: int
    rows: int

    @property
    def fraction(self) -> float:
        """Share of training done, in (0, 1]."""
        return self.step / self.steps

    @property
    def epoch_ended(self) -> bool:
        """True after the last step of an epoch, and after the last step of all."""
        return self.step % self.steps_per_epoch == 0 or self.done

    @property
    def done(self) -> bool:
        return self.step >= self.steps


@runtime_checkable
class Posterior(Protocol):
    """A distribution over the trainable leaves: a frozen dataclass whose repr is its configuration.

    State is an immutable dataclass of tensors, every one with the member axis K first, so that an ensemble's
    state is the state of its members stacked. ``init`` annotates the state's type; files are read back by it.
    What else a posterior may offer is in :mod:`kilobayes.protocols`.
    """

    def init(self, theta: Params, gen: torch.Generator) -> Any:
        """The state before training, from the adapter's initial leaves ``(K, ...)``."""
        ...

    def observe(self, state: Any, theta: Params, progress: Progress) -> Any:
        """The state after an optimiser step; what it keeps of ``theta`` it clones."""
        ...

    def sample(self, state: Any, n: int, gen: torch.Generator) -> Params:
        """``n`` draws ``(n, ...)`` from the uniform mixture of the K members, each member equally often."""
        ...

    def mean(self, state: Any) -> Params:
        """The posterior mean of each member ``(K, ...)``."""
        ...

    def support(self, state: Any) -> int | None:
        """How many distinct draws there are (K for a point), or None for a continuous posterior."""
        ...
