"""What a posterior may offer beyond :class:`kilobayes.types.Posterior`, one method each, asked for by name.

Training minimises, for each member, ``mean over rows of nll(perturb(theta)) + penalty(theta)``; everything
here has a default that changes nothing. :mod:`kilobayes.posteriors.ask` asks, and knows the defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from kilobayes.random import Streams
from kilobayes.types import Params, Progress


@dataclass(frozen=True, eq=False)
class Jacobian:
    """Derivatives of some rows' class scores.

    Attributes:
        rows: indices ``(B,)``.
        logits: class scores ``(B, C)``.
        gradients: per leaf ``(B, R, ...)``: of R combinations of a row's scores with respect to the leaf.
    """

    rows: Tensor
    logits: Tensor
    gradients: Params


class Energy(Protocol):
    """The model on some rows, as a posterior may ask of it after training, and of the rows trained on."""

    def __len__(self) -> int:
        """How many rows there are, N."""
        ...

    @property
    def labels(self) -> Tensor:
        """Labels ``(N,)``; rows to predict have none."""
        ...

    @property
    def train(self) -> Energy:
        """The same model on the rows it was trained on."""
        ...

    def part(self, rows: int) -> Energy:
        """The same model on at most so many of the rows, evenly spaced."""
        ...

    def logits(self, theta: Params) -> Tensor:
        """Class scores ``(S, N, C)`` of a stack."""
        ...

    def jacobians(
        self, theta: Params, keys: Sequence[str], combine: Callable[[Tensor], Tensor]
    ) -> Iterator[Jacobian]:
        """Exact derivatives row by row, in batches that fit into memory; every row once, in any order.

        Args:
            theta: one member, leaves ``(1, ...)``.
            keys: the leaves to differentiate with respect to.
            combine: class scores ``(B, C)`` to the combinations ``(B, C, R)`` whose derivatives are wanted;
                one backward pass each.
        """
        ...


@runtime_checkable
class Restricts(Protocol):
    """An energy whose adapter allows some weights only, as a sparse one does."""

    def restrict(self, draws: Params, around: Params) -> Params:
        """Draws ``(n, ...)`` with what the adapter keeps of the weights ``(n, ...)`` around them."""
        ...


@runtime_checkable
class SamplesLabels(Protocol):
    """An energy of too many classes for exact derivatives, as a language model's vocabulary."""

    def sampled(self, theta: Params, keys: Sequence[str], gen: Any) -> Iterator[Jacobian]:
        """Derivatives g of every row's log-likelihood at labels drawn from the model.

        The sum of g g^T over rows has the generalised Gauss-Newton matrix as its mean.
        """
        ...


@runtime_checkable
class Extends(Protocol):
    """A posterior with trainable leaves of its own, such as standard deviations."""

    def extend(self, theta: Params, streams: Streams) -> Params:
        """Leaves ``(S, ...)`` to train beside ``theta``, keys ``"site/leaf~name"``; noise of ``streams``."""
        ...


@runtime_checkable
class Perturbs(Protocol):
    """A posterior whose likelihood is taken at drawn weights."""

    def perturb(self, state: Any, theta: Params, rows: int, streams: Streams, progress: Progress) -> Params:
        """The adapter's leaves, differentiable in ``theta``, at which a step's likelihood is taken.

        Called once per optimiser step, so a step's noise depends neither on micro-batches nor on processes.

        Args:
            theta: all trainable leaves ``(S, ...)``, the posterior's own included.
            rows: rows B of a member in the step.

        Returns:
            Leaves ``(S, ...)``, one draw for all rows, or ``(S B, ...)``, member by member, one for each row;
            without the posterior's own.
        """
        ...


@runtime_checkable
class Penalises(Protocol):
    """A posterior that adds something to the loss (a prior, a Kullback-Leibler divergence)."""

    def penalty(self, state: Any, theta: Params, progress: Progress) -> Tensor:
        """What is added to each member's loss ``(S,)``, in nats per row."""
        ...


@runtime_checkable
class Optimises(Protocol):
    """A posterior that moves the weights itself, in the place of AdamW."""

    def update(
        self, state: Any, theta: Params, drawn: Params, gradients: Params, rates: Tensor, progress: Progress
    ) -> Any:
        """Changes ``theta`` in place and returns the new state.

        Args:
            drawn: what :meth:`Perturbs.perturb` gave, or ``theta``.
            gradients: of the loss with respect to ``theta`` ``(S, ...)``.
            rates: learning rate of each member ``(S,)``; a member at 0 stays as it is, state included.
        """
        ...


@runtime_checkable
class Rates(Protocol):
    """A posterior whose own leaves learn at another rate."""

    def rates(self, theta: Params) -> dict[str, float]:
        """Factors of the learning rate by key; 1 where absent."""
        ...


@runtime_checkable
class Schedules(Protocol):
    """A posterior that sets the learning rate late in training (SWA and SWAG)."""

    def rate(self, progress: Progress, own: Callable[[int], float]) -> float:
        """Learning rate of the step to come, relative to the peak; ``own(step)`` is the loop's, from 1."""
        ...


@runtime_checkable
class Validates(Protocol):
    """A posterior that looks at the calibration rows while training (ASWA)."""

    def validate(self, state: Any, theta: Params, progress: Progress, energy: Energy) -> Any:
        """The state after an epoch, called after ``observe``; what it keeps of ``theta`` it clones."""
        ...


@runtime_checkable
class Fits(Protocol):
    """A posterior fitted once after training.

    One that needs calibration rows, not only those trained on, says so: ``calibrates = True``, or a property.
    """

    def fit(self, state: Any, energy: Energy, gen: Any) -> Any: ...


@runtime_checkable
class Predicts(Protocol):
    """A posterior that predicts in its own way, not by running sampled weights (linearised Laplace)."""

    def logits(self, state: Any, energy: Energy, n: int, gen: Any) -> Tensor:
        """Draws of the class scores ``(n, N, C)`` of the rows of ``energy``, its labels unused.

        There may be more than n where they cost next to nothing: whoever asks goes by the first axis.
        """
        ...


@runtime_checkable
class Transforms(Protocol):
    """A posterior that changes class scores at prediction (temperature)."""

    def transform(self, state: Any, logits: Tensor) -> Tensor:
        """Scores ``(S, N, C)`` of all draws to scores."""
        ...
