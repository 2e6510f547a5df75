"""The rounds of a server, whoever asks: users send updates, the round closes, mixtures are kept for them.

No network here: every method is called by a request or by the clock, one at a time. A round closes when all
users have sent, or ``wait`` seconds after the first did; with fewer than ``least`` it is skipped.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kilobayes.collaboration import rounds
from kilobayes.errors import KilobayesError
from kilobayes.federated import closing, wire
from kilobayes.federated.closing import Late, Plan
from kilobayes.federated.ledger import LOSSES, UPDATES, Ledger
from kilobayes.types import Params


class Room:
    """Where a collaboration happens.

    Args:
        say: told of every round in a line.
    """

    def __init__(self, plan: Plan, ledger: Ledger, say: Callable[[str], None] = lambda line: None) -> None:
        self.plan, self.ledger, self.say = plan, ledger, say
        self.lock = threading.RLock()
        self.state = ledger.load()
        self.theta: dict[str, Params] = {}
        self.predictions: dict[str, Tensor] = {}
        self.losses: dict[str, Tensor] = {}
        self.up: dict[str, int] = {}
        self.since: float | None = None  # since when the phase waits; None before anyone sent
        self._recall()

    @property
    def over(self) -> bool:
        return self.state.round >= len(self.plan.exchanges)

    @property
    def emptied(self) -> bool:
        """Whether all users have their last mixture: nobody will ask again."""
        return self.over and set(self.plan.users) <= set(self.state.done)

    def join(self, user: str, hello: dict[str, Any]) -> None:
        """Take note of a user's number of rows, each time a client starts.

        Raises:
            KilobayesError: another base model, other shared rows, or no number.
        """
        rows = closing.checked(self.plan, hello)
        with self.lock:
            self.state.rows[user] = rows
            self.ledger.save(self.state)

    def status(self, user: str) -> dict[str, Any]:
        """Where things stand, as a client needs it to go on."""
        with self.lock:
            state = self.state
            return {
                "round": state.round,
                "phase": state.phase,
                "present": state.present,
                "latest": state.latest.get(user),
                "over": self.over,
            }

    def update(self, user: str, at: int, body: bytes) -> None:
        """Take a user's update of the open round; the same again, after a lost answer, is taken again.

        Raises:
            Late: another round is open.
            KilobayesError: what was sent cannot be mixed.
        """
        theta, predictions = wire.unpack_update(body)
        if user not in self.state.rows:
            raise KilobayesError(f"{user} has not joined")
        if odd := rounds.wrong(theta, self.plan.like) or closing.excessive(theta):
            raise KilobayesError("the update cannot be mixed", odd, "check the data, and --lr")
        if self.plan.scheme.needs == "predictions":
            if predictions is None or predictions.dim() != 3 or len(predictions) != 1:
                raise KilobayesError("predictions of the shared rows are missing")
            if not bool(predictions.isfinite().all()):
                raise KilobayesError("the predictions of the shared rows are not finite")
        elif predictions is not None:
            raise KilobayesError("predictions were sent, and nobody asked for them")
        with self.lock:
            self._open(at, UPDATES)
            kept = {f"theta|{k}": v for k, v in theta.items()}
            kept |= {} if predictions is None else {wire.PREDICTIONS: predictions}
            self.ledger.put(user, "update", at, kept, len(body))
            self._took(user, theta, predictions, len(body))
            if set(self.theta) >= set(self.plan.users):
                self._collected()

    def everyone(self, user: str, at: int) -> bytes:
        """The updates of all who are in the round, for a user to try on its own rows."""
        with self.lock:
            self._open(at, LOSSES)
            if user not in self.state.present:
                raise Late
            return self._everyone()

    def scored(self, user: str, at: int, body: bytes) -> None:
        """Take what everybody's adapters lose on a user's own rows ``(1, V)``.

        Raises:
            Late: it is not time for them.
            KilobayesError: another shape.
        """
        found = wire.unpack(body)
        with self.lock:
            self._open(at, LOSSES)
            if user not in self.state.present:
                raise Late
            losses = found.get(wire.LOSSES)
            if len(found) != 1 or losses is None or losses.shape != (1, len(self.state.present)):
                raise KilobayesError("a loss for each user of the round is needed")
            if not bool(losses[0, self.state.present.index(user)].isfinite()):
                raise KilobayesError("one's own adapter has no finite loss", remedy="check the data")
            self.ledger.put(user, "losses", at, found, len(body))
            self.losses[user], self.up[user] = losses, self.up[user] + len(body)
            if set(self.losses) >= set(self.state.present):
                self._scored()

    def mixed(self, user: str, at: int) -> bytes | None:
        """What a round made for a user; None if it was not part of it.

        Raises:
            Late: the round is not over.
        """
        if at >= self.state.round:
            raise Late
        found = self.ledger.get(user, "mixed", at)
        return None if found is None else wire.pack(found[0])

    def leave(self, user: str) -> None:
        """A user has what the last round left it."""
        with self.lock:
            if self.over and user not in self.state.done:
                self.state.done.append(user)
                self.ledger.save(self.state)

    def tick(self) -> None:
        """Close what has waited long enough."""
        with self.lock:
            if not self.over and self.since is not None and time.monotonic() - self.since > self.plan.wait:
                (self._collected if self.state.phase == UPDATES else self._scored)()

    def _open(self, at: int, phase: str) -> None:
        if self.over or (at, phase) != (self.state.round, self.state.phase):
            raise Late

    def _took(self, user: str, theta: Params, predictions: Tensor | None, size: int) -> None:
        self.theta[user], self.up[user] = theta, size
        if predictions is not None:
            self.predictions[user] = predictions
        self.since = time.monotonic() if self.since is None else self.since

    def _collected(self) -> None:
        """Who is in the round is settled; users score each other first where trust needs it."""
        present, refused = closing.sort(self.plan, self.theta, self.predictions)
        self.state.present, self.state.refused = present, refused
        if self.plan.scheme.needs != "losses" or len(present) < self.plan.least:
            self._close()
            return
        self.state.phase, self.losses, self.since = LOSSES, {}, time.monotonic()
        self.ledger.save(self.state)

    def _scored(self) -> None:
        before = self.state.present
        self.state.present = [user for user in before if user in self.losses]
        self.state.refused |= {user: "no losses" for user in before if user not in self.losses}
        kept = [before.index(user) for user in self.state.present]
        self.losses = {user: self.losses[user][:, kept] for user in self.state.present}
        self._close()

    def _close(self) -> None:
        """Mix, keep everybody's mixture and the round's line, and go on to the next."""
        state, at = self.state, self.state.round
        names = list(self.plan.users)
        line = {"round": at, "step": self.plan.exchanges[at], "users": names, "refused": state.refused}
        down: dict[str, int] = {}
        shared = len(self._everyone()) if state.phase == LOSSES and state.present else 0
        found = self._outcome()
        if isinstance(found, str):
            line |= {"skipped": found, "trust": torch.eye(len(names)).tolist()}
        else:
            for i, user in enumerate(state.present):
                mine = {k: v[i : i + 1] for k, v in found.theta.items()}
                down[user] = shared + len(wire.pack(mine))
                self.ledger.put(user, "mixed", at, mine, down[user])
                state.latest[user] = at
            trust = [[round(x, 6) for x in row] for row in found.trust.tolist()]
            line |= {"trust": trust, "average": found.how, "lost": closing.shown(found.lost)}
        line |= {k: [of.get(u, 0) for u in names] for k, of in (("up_bytes", self.up), ("down_bytes", down))}
        self.ledger.record(line)
        state.round, state.phase, state.present, state.refused = at + 1, UPDATES, [], {}
        self.theta, self.predictions, self.losses, self.up, self.since = {}, {}, {}, {}, None
        self.ledger.save(state)
        self.say(closing.told(line, len(self.plan.exchanges)))

    def _outcome(self) -> closing.Outcome | str:
        present = self.state.present
        if len(present) < self.plan.least:
            return f"{len(present)} of at least {self.plan.least} users"
        rows = [self.state.rows[user] for user in present]
        try:
            return closing.outcome(self.plan, present, self._stack(), self.predictions, self.losses, rows)
        except KilobayesError as error:
            return str(error)

    def _recall(self) -> None:
        """What users had sent before the server ended; the wait begins anew."""
        if self.over:
            return
        at = self.state.round
        for user, (tensors, size) in self.ledger.received(self.plan.users, "update", at).items():
            predictions = tensors.pop(wire.PREDICTIONS, None)
            theta = {k.removeprefix("theta|"): v for k, v in tensors.items()}
            self._took(user, theta, predictions, size)
        if self.state.phase == LOSSES:
            for user, (tensors, size) in self.ledger.received(self.state.present, "losses", at).items():
                self.losses[user], self.up[user] = tensors[wire.LOSSES], self.up[user] + size
        full = self.losses if self.state.phase == LOSSES else self.theta
        if full and set(full) >= set(self.state.present if self.state.phase == LOSSES else self.plan.users):
            (self._scored if self.state.phase == LOSSES else self._collected)()

    def _stack(self) -> Params:
        first = self.theta[self.state.present[0]]
        return {k: torch.cat([self.theta[user][k] for user in self.state.present]) for k in first}

    def _everyone(self) -> bytes:
        return wire.pack_everyone(self.state.present, self._stack())
