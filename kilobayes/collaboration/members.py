"""Users of one process, trained as one stack: all of them in a simulation, one of them in a client.

The same code and, up to the rounding of products of another shape, the same result: a user's rows, noise and
start come from the shared seed and the user's own name. Where training stands is a checkpoint on disk, so a
process that is killed at any point goes on to the same result.

A posterior collected in training (SWA, SWAG) is a user's own unless moments are shared: what is exchanged
then are the leaves in training, and an exchange after the last step changes a point alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kilobayes import store, train, tree
from kilobayes.card import Card
from kilobayes.checkpoint import Checkpoint
from kilobayes.collaboration import rounds, standing
from kilobayes.collaboration.settings import Together
from kilobayes.collaboration.subjects import Subject
from kilobayes.errors import KilobayesError
from kilobayes.files import write_json, write_text_atomically
from kilobayes.metrics.conformal import Calibration
from kilobayes.options import Options
from kilobayes.posteriors import ask
from kilobayes.random import generator
from kilobayes.run_yaml import write_yaml
from kilobayes.step import TrainData
from kilobayes.types import Params, Posterior, Progress
from kilobayes.workflows import conformal
from kilobayes.workflows.finetune import Fitted


def user_seed(seed: int, name: str) -> int:
    """A user's seed of data order and noise, from the shared seed and its name alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")


@dataclass(eq=False)
class Party:
    """Users trained in one forward on one hosted model; :mod:`kilobayes.collaboration.party` gathers them.

    Attributes:
        names: the users.
        subject: the hosted model with what is learned.
        data, own: all users' training rows, and whose are which.
        held: for each user, its "trust" and its "test" rows, encoded; the first may be None.
        reference: shared rows, encoded, or None.
        start: initial leaves ``(U, ...)``.
        checkpoint: where training stands; ``resume`` is set.
        card: what a user's run says of itself; its seed is that of draws.
        sources: names of users' data, for their ``run.yaml``; none of those in memory.
        watch: told of every step.
        at: what the checkpoint holds; empty before the first step.
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
    checkpoint: Checkpoint
    card: Card
    options: Options
    sources: dict[str, str]
    watch: Callable[[Progress, Tensor], None] | None = None
    at: dict[str, Tensor] = field(default_factory=dict, init=False)
    states: list[Any] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.checkpoint.path.exists():
            self.at = self.checkpoint.read()

    @property
    def model(self) -> nn.Module:
        """Hosts the adapter, a stack of one."""
        return self.subject.model

    @property
    def fingerprint(self) -> str:
        """Of the frozen base: what users have in common."""
        return self.card.fingerprint

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
    def training_losses(self) -> Tensor:
        """Of every step so far ``(steps, U)``, in nats per row or token."""
        return self.at["losses"][: self.step] if self.at else torch.zeros(0, len(self.names))

    def train(self, until: int) -> Params:
        """Go on to step ``until`` and return the users' updates ``(U, ...)``; at once where it is reached.

        Raises:
            KilobayesError: as :func:`kilobayes.train.fit`; where all users diverged, it says so.
        """
        if self.step < until:
            with self.subject.training(self.data, self.own) as nll:
                train.fit(
                    self.model, self.data, nll, self.posterior, self.start, self.settings,
                    save=self.checkpoint, watch=self.watch, own=self.own, until=until,
                )  # fmt: skip
            self.at, self.states = self.checkpoint.read(), []
        return self.update()

    def update(self) -> Params:
        """What users send ``(U, ...)``: their leaves, and moments where these are shared."""
        if self.at:
            return standing.update(self.at, self.posterior, self.together.share)
        if self.together.share == "mean":
            return self.start
        zero = {f"{k}{rounds.VARIANCE}": torch.zeros_like(v) for k, v in self.start.items()}
        return self.start | {f"{k}{rounds.MEAN}": v for k, v in self.start.items()} | zero

    def adopt(self, theta: Params) -> None:
        """Replace the leaves ``(U, ...)``, and moments where these are shared; optimiser and data order stay.

        The step at which that was is noted beside them, so that after a kill it is done once.
        """
        changed = standing.replaced(self.at, self.posterior, theta, self.together.share)
        self.checkpoint.change(changed | {"adopted": self.at["step"]})
        self.at, self.states = self.checkpoint.read(), []

    def predictions(self) -> Tensor:
        """Log-probabilities ``(U, N, C)`` in half precision on the shared rows, or tokens.

        Raises:
            KilobayesError: there are no shared rows.
        """
        if self.reference is None:
            raise KilobayesError("there are no shared rows to predict", remedy="as in reference: texts.jsonl")
        drawn, together = self._draws(self.update()), self.together
        return self.subject.predictions(drawn, self.reference, together.draws, together.positions).half()

    def losses(self, theirs: Params) -> Tensor:
        """``(U, V)``: nats per row, or token, of everyone's updates ``(V, ...)`` on one's own trust rows.

        Raises:
            KilobayesError: a user has no trust rows.
        """
        drawn, draws = self._draws(theirs), self.together.draws
        mine = [self._held(place, "trust") for place in range(len(self.names))]
        return torch.stack([self.subject.losses(drawn, rows, draws) for rows in mine])

    def finish(self) -> list[Any]:
        """Each user's posterior state, with what is fitted after training, on its trust rows."""
        if not self.states:
            whole = standing.state(self.at, self.posterior)
            for place in range(len(self.names)):
                state = tree.state_member(whole, place)
                if ask.needs_calibration(self.posterior):
                    energy = self.subject.energy(self._held(place, "trust"))
                    state = ask.fit(self.posterior, state, energy, generator(self.card.seed, 6))
                self.states.append(state)
        return self.states

    def test(self, on: str = "test") -> list[dict[str, float]]:
        """Figures of each user on its own test rows, or on its trust rows, with draws of its posterior."""
        out = []
        for place, state in enumerate(self.finish()):
            rows = self._held(place, on)
            count = ask.count(self.posterior, state, self.card.samples)
            energy = self.subject.energy(rows)
            theta = ask.draws(self.posterior, state, energy, count, generator(self.card.seed, 7))

            def transform(scores: Tensor, state: Any = state) -> Tensor:
                return ask.transform(self.posterior, state, scores)

            out.append(self.subject.figures(theta, rows, transform))
        return out

    def save(self, folders: Sequence[Path]) -> dict[str, int]:
        """Each user as a run that predicts, is evaluated, generates; returns bytes of a run by part."""
        sizes: dict[str, int] = {}
        for place, (name, folder) in enumerate(zip(self.names, folders, strict=True)):
            state, held = self.finish()[place], self.held[place]["trust"]
            sizes = store.save(folder, self.model, self.posterior, state, self.card)
            own = replace(self.options, data=self.sources.get(name, ""), out=str(folder))
            write_yaml(folder / "run.yaml", own)
            if own.task != "lm" and held is not None:
                fitted = Fitted(self.model, self.subject.task, self.posterior, state, self.card)
                probs = fitted.predict(held).probs.numpy().astype(np.float32)
                conformal.write(folder, Calibration(probs, held.labels.numpy()))
            stored = float(sizes["checkpoint"] + sizes["posterior"])
            write_json(folder / "cost.json", {"stored_bytes": stored, "sizes": sizes})
            told = "of one user after a collaboration; `kilobayes evaluate` measures it"
            write_text_atomically(folder / "README.md", f"# {name}\n\nThe adapter {told}.\n")
        return sizes

    def _held(self, place: int, kind: str) -> Any:
        found = self.held[place].get(kind)
        if found is None:
            raise KilobayesError(
                f"user {self.names[place]} has no {kind} rows", "calibration 0", "as in calibration: 0.2"
            )
        return found

    def _draws(self, update: Params) -> Params:
        # of the same noise for everybody, in whatever process
        return rounds.drawn(update, self.together.draws, generator(self.card.seed, 11, self.step))
