"""A posterior around another: everything is handed on to the base unless the wrapper says otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kilobayes.posteriors import ask
from kilobayes.protocols import Energy, Predicts
from kilobayes.random import Streams
from kilobayes.types import Params, Posterior, Progress


class Wrapping:
    """Delegates every protocol to ``base``, whose state is the field ``inner`` of the wrapper's own."""

    base: Posterior

    def inner(self, state: Any) -> Any:
        """The base's state."""
        return state.inner

    def around(self, state: Any, inner: Any) -> Any:
        """The wrapper's state around another state of the base."""
        return replace(state, inner=inner)

    def extend(self, theta: Params, streams: Streams) -> Params:
        return ask.extend(self.base, theta, streams)

    def perturb(self, state: Any, theta: Params, rows: int, streams: Streams, progress: Progress) -> Params:
        return ask.perturb(self.base, self.inner(state), theta, rows, streams, progress)

    def penalty(self, state: Any, theta: Params, progress: Progress) -> Tensor:
        return ask.penalty(self.base, self.inner(state), theta, progress)

    def update(
        self, state: Any, theta: Params, drawn: Params, gradients: Params, rates: Tensor, progress: Progress
    ) -> Any:
        inner = ask.update(self.base, self.inner(state), theta, drawn, gradients, rates, progress)
        return self.around(state, inner)

    def rates(self, theta: Params) -> dict[str, float]:
        return ask.rates(self.base, theta)

    def rate(self, progress: Progress, own: Callable[[int], float]) -> float:
        return ask.rate(self.base, progress, own)

    def observe(self, state: Any, theta: Params, progress: Progress) -> Any:
        return self.around(state, self.base.observe(self.inner(state), theta, progress))

    def validate(self, state: Any, theta: Params, progress: Progress, energy: Energy) -> Any:
        return self.around(state, ask.validate(self.base, self.inner(state), theta, progress, energy))

    def fit(self, state: Any, energy: Energy, gen: torch.Generator) -> Any:
        return self.around(state, ask.fit(self.base, self.inner(state), energy, gen))

    def logits(self, state: Any, energy: Energy, n: int, gen: torch.Generator) -> Tensor:
        if isinstance(ask.innermost(self.base), Predicts):
            return ask.logits(self.base, self.inner(state), energy, n, gen)
        # as the wrapper samples, which may not be as the base
        return energy.logits(ask.draws(self, state, energy, n, gen))  # type: ignore[arg-type]

    def transform(self, state: Any, logits: Tensor) -> Tensor:
        return ask.transform(self.base, self.inner(state), logits)

    def sample(self, state: Any, n: int, gen: torch.Generator) -> Params:
        return self.base.sample(self.inner(state), n, gen)

    def mean(self, state: Any) -> Params:
        return self.base.mean(self.inner(state))

    def support(self, state: Any) -> int | None:
        return self.base.support(self.inner(state))
