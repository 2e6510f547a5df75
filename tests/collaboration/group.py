"""A server of a collaboration in this process, and users who send made-up updates."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from kilobayes.collaboration import rounds
from kilobayes.collaboration.scheme import Scheme
from kilobayes.federated import tokens, wire
from kilobayes.federated.app import application
from kilobayes.federated.closing import Plan
from kilobayes.federated.ledger import Ledger
from kilobayes.federated.room import Room
from kilobayes.testing.tiny import perturbed, tiny_start
from kilobayes.types import Params

USERS = ["anna", "ben", "cara"]
ROWS = {"anna": 30, "ben": 10, "cara": 60}
SECRETS = {user: f"token of {user}" for user in USERS}
DIGESTS = {user: tokens.digest(secret) for user, secret in SECRETS.items()}
Make = Callable[..., "Group"]


class Group:
    """A server and its users.

    Args:
        given: fields of the plan.
    """

    def __init__(self, folder: Path, model: Any, largest: int, **given: Any) -> None:
        self.folder, self.model = folder, model
        start = tiny_start(model, [1, 2, 3])
        like = rounds.shapes({k: v[:1] for k, v in start.items()})
        theta = perturbed(start, size=0.3)
        self.theta = {user: {k: v[i : i + 1] for k, v in theta.items()} for i, user in enumerate(USERS)}
        fields: dict[str, Any] = {"users": USERS, "exchanges": [4, 8], "scheme": Scheme("fedavg")}
        fields |= {"average": "leaves", "model": model, "like": like, "fingerprint": "f"} | given
        self.lines: list[str] = []
        self.room = Room(Plan(**fields), Ledger(folder, {"settings": 1}), self.lines.append)
        app = application(self.room, {"settings": True}, DIGESTS, largest=largest, timeout=5.0)
        self.client = TestClient(app)

    def ask(self, user: str, path: str, **given: Any) -> Any:
        headers = {"kilobayes-user": user, "authorization": f"Bearer {SECRETS[user]}"}
        method = "POST" if given else "GET"
        return self.client.request(method, f"/v1{path}", headers=headers, **given)

    def join(self, *users: str) -> None:
        for user in users:
            hello = {"rows": ROWS[user], "fingerprint": "f", "reference": ""}
            assert self.ask(user, "/join", json=hello).status_code == 200

    def send(self, user: str, at: int, theta: Params | None = None, **extra: Any) -> Any:
        body = wire.pack_update(theta or self.theta[user], extra.get("predictions"))
        return self.ask(user, f"/rounds/{at}/update", content=body)

    def mixed(self, user: str, at: int) -> Params:
        answer = self.ask(user, f"/rounds/{at}/mixed")
        assert answer.status_code == 200
        assert answer.headers["content-type"] == wire.TENSORS
        return wire.unpack(answer.content)

    def closed(self) -> None:
        """Wait until the clock has closed the first round."""
        end = time.monotonic() + 30
        while not self.lines:
            assert time.monotonic() < end
            time.sleep(0.02)

    def records(self) -> list[dict[str, Any]]:
        lines = (self.folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def averaged(group: Group, users: list[str], weights: list[float]) -> Params:
    keys = group.theta["anna"]
    return {k: sum(w * group.theta[u][k] for u, w in zip(users, weights, strict=True)) for k in keys}
