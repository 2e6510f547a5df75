"""Users of one process, trained as one stack: all of them in a simulation, one of them in a client.

The same code and, up to the rounding of products of another shape, the same result: a user's rows, noise and
start come from the shared seed and the user's own name. Where training stands is a checkpoint on disk, so a
process that is killed at any point goes on to the same result.

A posterior collected in training (SWA, SWAG) is a user's own unless moments are shared: what is exchanged
then are the leaves in training, and an exchange after the last step changes a point alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from kilobayes import train, tree
from kilobayes.card import Card
from kilobayes.checkpoint import Checkpoint
from kilobayes.collaboration.rounds import MEAN, VARIANCE
from kilobayes.collaboration.settings import Together
from kilobayes.collaboration.subjects import Subject
from kilobayes.errors import KilobayesError
from kilobayes.posteriors import ask
from kilobayes.posteriors.point import PointState
from kilobayes.random import generator
from kilobayes.step import TrainData
from kilobayes.types import Params, Posterior, Progress


def user_seed(seed: int, name: str) -> int:
    """A user's seed of data order and noise, from the shared seed and its name alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")


@dataclass(eq=False)
class Party:
    """Users trained in one forward on one hosted model; :func:`kilobayes.workflows.gather.gather` makes it.

    Attributes:
        names: the users.
        subject: the hosted model with what is learned, for :mod:`kilobayes.collaboration.rounds` too.
        data, own: all users' training rows, and whose are which.
        held: for each user, its "trust" and its "test" rows, encoded; the first may be None.
        reference: shared rows, encoded, or None.
        start: initial leaves ``(U, ...)``.
        save: where training stands; ``resume`` is set.
        card: what a user's run says of itself; its seed is that of draws.
    """

    names: tuple[str, ...]
    subject: Subject
    posterior: Posterior
    settings: train.Settings
    together: Together
    data: TrainData
    own: list[Tensor]
    held: list[dict[str, Any]]
    reference: Any
    start: Params
    save: Checkpoint
    card: Card
    watch: Callable[[Progress, Tensor], None] | None = None
    at: dict[str, Tensor] = field(default_factory=dict, init=False)
    fitted: list[Any] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.save.path.exists():
            self.at = self.save.read()

    @property
    def model(self) -> nn.Module:
        """Hosts the adapter, a stack of one."""
        return self.subject.model

    @property
    def rows(self) -> list[int]:
        """Numbers of training rows (of a language model: windows)."""
        return [len(rows) for rows in self.own]

    @property
    def step(self) -> int:
        """Optimiser steps done; 0 before the first call of :meth:`train`."""
        return int(self.at.get("step", torch.zeros(())))

    @property
    def adopted(self) -> int:
        """The step at which leaves were last adopted if no step was taken since, else 0."""
        return int(self.at.get("adopted", torch.zeros(())))

    @property
    def alive(self) -> list[bool]:
        """Whether each user still trains; who diverged is left as it was."""
        return [bool(x) for x in self.at["alive"]] if self.at else [True] * len(self.names)

    @property
    def losses_so_far(self) -> Tensor:
        """Training losses ``(step, U)`` in nats per row or token."""
        return self.at["losses"][: self.step] if self.at else torch.zeros(0, len(self.names))

    def train(self, until: int) -> Params:
        """Go on to step ``until`` and return the users' updates ``(U, ...)``; at once where it is reached.

        Raises:
            KilobayesError: as :func:`kilobayes.train.fit`; where all users diverged, it says so.
        """
        if self.step < until:
            with self.subject.training(self.data, self.own) as nll:
                train.fit(
                    self.model, self.data, nll, self.posterior, self.start, self.settings, save=self.save,
                    watch=self.watch, own=self.own, until=until,
                )  # fmt: skip
            self.at, self.fitted = self.save.read(), []
        return self.update()

    def update(self) -> Params:
        """What users send ``(U, ...)``: their leaves, and moments where these are shared."""
        theta = tree.plain(_part(self.at, "theta|")) if self.at else self.start
        if self.together.share == "mean":
            return theta
        state = self._inner()
        seen = state is not None and float(state.count[0]) > 0
        means = state.average if seen else theta
        variances = {
            k: state.squares[k] / state.count[0] if seen else torch.zeros_like(theta[k]) for k in theta
        }
        out = theta | {f"{key}{MEAN}": means[key].float() for key in theta}
        return out | {f"{key}{VARIANCE}": variances[key].float().clamp(min=0) for key in theta}

    def adopt(self, theta: Params) -> None:
        """Replace the leaves ``(U, ...)``, and moments where these are shared; optimiser and data order stay.

        The step at which that was is noted beside them, so that after a kill it is done once.
        """
        held = _part(self.at, "theta|")
        changed = {f"theta|{key}": value.to(held[key]) for key, value in tree.plain(theta).items()}
        prefix = "state|" + "inner|" * (len(list(ask.chain(self.posterior))) - 1)
        if self.together.share == "moments" and float(self._inner().count[0]) > 0:
            count = self.at[f"{prefix}count"][0]
            for key in tree.plain(theta):
                average, squares = f"{prefix}average|{key}", f"{prefix}squares|{key}"
                changed[average] = theta[f"{key}{MEAN}"].to(self.at[average])
                changed[squares] = (theta[f"{key}{VARIANCE}"] * count).to(self.at[squares])
        self.save.change(changed | {"adopted": self.at["step"]})
        self.at, self.fitted = self.save.read(), []

    def predictions(self) -> Tensor:
        """Log-probabilities ``(U, N, C)`` in half precision on the shared rows, or tokens.

        Raises:
            KilobayesError: there are no shared rows.
        """
        if self.reference is None:
            raise KilobayesError("there are no shared rows to predict", remedy="as in reference: texts.jsonl")
        drawn = self._drawn(self.update())
        most = self.together.positions
        return self.subject.predictions(drawn, self.reference, self.together.draws, most).half()

    def losses(self, theirs: Params) -> Tensor:
        """``(U, V)``: nats per row, or token, of everyone's updates ``(V, ...)`` on one's own trust rows.

        Raises:
            KilobayesError: a user has no trust rows.
        """
        drawn = self._drawn(theirs)
        return torch.stack(
            [
                self.subject.losses(drawn, self._held(u, "trust"), self.together.draws)
                for u in range(len(self.names))
            ]
        )

    def finish(self) -> list[Any]:
        """Each user's posterior state, with what is fitted after training, on its trust rows."""
        if not self.fitted:
            whole = self._state()
            for place in range(len(self.names)):
                state = tree.state_member(whole, place)
                if ask.needs_calibration(self.posterior):
                    energy = self.subject.energy(self._held(place, "trust"))
                    state = ask.fit(self.posterior, state, energy, generator(self.card.seed, 6))
                self.fitted.append(state)
        return self.fitted

    def test(self, on: str = "test") -> list[dict[str, float]]:
        """Figures of each user on its own test rows, or on its trust rows, with draws of its posterior."""
        out = []
        for place, state in enumerate(self.finish()):
            rows = self._held(place, on)
            count = ask.count(self.posterior, state, self.card.samples)
            energy = self.subject.energy(rows)
            drawn = ask.draws(self.posterior, state, energy, count, generator(self.card.seed, 7))
            out.append(
                self.subject.figures(drawn, rows, lambda s, at=state: ask.transform(self.posterior, at, s))
            )
        return out

    def _held(self, place: int, kind: str) -> Any:
        found = self.held[place].get(kind)
        if found is None:
            raise KilobayesError(
                f"user {self.names[place]} has no {kind} rows", "calibration 0", "as in calibration: 0.2"
            )
        return found

    def _drawn(self, update: Params) -> Params:
        """Draws ``(V draws, ...)`` of shared moments, of the same noise; the leaves for one draw."""
        n, theta = self.together.draws, tree.plain(update)
        if n == 1:
            return theta
        out = {}
        for key in sorted(theta):
            mean, deviation = update[f"{key}{MEAN}"], update[f"{key}{VARIANCE}"].sqrt()
            noise = torch.randn(n, *mean.shape[1:], generator=generator(self.card.seed, 11, self.step))
            out[key] = (mean[:, None] + deviation[:, None] * noise.to(mean)).flatten(0, 1)
        return out

    def _inner(self) -> Any:
        """The state of the innermost posterior, of all users; None before training."""
        state: Any = self._state(fresh=False) if self.at else None
        while hasattr(state, "inner"):
            state = state.inner
        return state

    def _state(self, fresh: bool = True) -> Any:
        state = tree.unflatten_state(self.posterior, _part(self.at, "state|"))
        return _with_point(state, tree.plain(_part(self.at, "theta|"))) if fresh else state


def _with_point(state: Any, theta: Params) -> Any:
    """The state with a point's leaves as they are now; any other as it is."""
    if isinstance(state, PointState):
        return replace(state, theta=theta)
    return replace(state, inner=_with_point(state.inner, theta)) if hasattr(state, "inner") else state


def _part(tensors: dict[str, Tensor], prefix: str) -> Params:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
