"""The server's memory on disk, by user: a server that is killed at any point goes on from here.

``state.json`` says where the collaboration stands and is written last, so that whatever a kill interrupts is
done again from what users sent, to the same result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from kilobayes.checkpoint import read_tensors, write_atomically
from kilobayes.errors import KilobayesError
from kilobayes.files import write_json, write_lines

STATE, ROUNDS = "state.json", "rounds.jsonl"
UPDATES, LOSSES = "updates", "losses"  # what a round waits for
KINDS = ("update", "losses", "mixed")


@dataclass
class State:
    """Where a collaboration stands.

    Attributes:
        round: the open one, from 0; the number of rounds when all are over.
        phase: "updates", or then "losses".
        present: users whose updates were taken, in the phase "losses".
        refused: why the others' were not.
        rows: numbers of training rows by user, of those who joined.
        latest: the last round that a user was part of.
        done: users who have what the last round left them.
    """

    round: int = 0
    phase: str = UPDATES
    present: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    latest: dict[str, int] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)


class Ledger:
    """A folder that holds all that a server must remember.

    Args:
        identity: what the collaboration is; a folder of another is refused.

    Raises:
        KilobayesError: the folder is of another collaboration, or damaged.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder, self.identity = folder, json.loads(json.dumps(identity))
        self.records: list[dict[str, Any]] = []

    def load(self) -> State:
        """The state on disk, or a new one."""
        path = self.folder / STATE
        if not path.exists():
            return State()
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            theirs, state = found.pop("identity"), State(**found)
            lines = (self.folder / ROUNDS).read_text(encoding="utf-8").splitlines() if state.round else []
            self.records = [json.loads(line) for line in lines][: state.round]
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            raise KilobayesError(
                f"{self.folder} is damaged", str(error)[:200], "name another folder"
            ) from None
        odd = [k for k in {**theirs, **self.identity} if theirs.get(k) != self.identity.get(k)]
        if odd:
            raise KilobayesError(
                f"{self.folder} holds another collaboration",
                "; ".join(f"{k}: {theirs.get(k)} there, {self.identity.get(k)} here" for k in odd[:3]),
                "start with the same settings, or name another --out",
            )
        return state

    def save(self, state: State) -> None:
        write_json(self.folder / STATE, vars(state) | {"identity": self.identity})

    def record(self, line: dict[str, Any]) -> None:
        """Add a round's line to ``rounds.jsonl``; the line of a round that is done again is replaced."""
        self.records = [*self.records[: line["round"]], line]
        write_lines(self.folder / ROUNDS, self.records)

    def put(self, user: str, kind: str, at: int, tensors: Mapping[str, Tensor], size: int = 0) -> None:
        """Keep what belongs to a user and a round, in place of what there was of an earlier one."""
        write_atomically(self._path(user, kind), tensors, {"round": str(at), "bytes": str(size)})

    def get(self, user: str, kind: str, at: int) -> tuple[dict[str, Tensor], int] | None:
        """Tensors of a user and round, and the bytes that they came in; None if there are none."""
        path = self._path(user, kind)
        if not path.exists():
            return None
        tensors, metadata = read_tensors(path)
        return (tensors, int(metadata["bytes"])) if metadata.get("round") == str(at) else None

    def received(self, users: Sequence[str], kind: str, at: int) -> dict[str, tuple[dict[str, Tensor], int]]:
        """All users' of a round."""
        found = {user: self.get(user, kind, at) for user in users}
        return {user: value for user, value in found.items() if value is not None}

    def _path(self, user: str, kind: str) -> Path:
        return self.folder / "users" / user / f"{kind}.safetensors"
