"""Real users of a tiny model against a server in this process: who is absent, returns, loses its disk."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx2")

from kilobayes.collaboration.party import Party, gather
from kilobayes.collaboration.scheme import Scheme
from kilobayes.collaboration.settings import read
from kilobayes.federated import client, tokens
from kilobayes.federated.app import application
from kilobayes.federated.base import hosted
from kilobayes.federated.closing import Plan
from kilobayes.federated.ledger import Ledger
from kilobayes.federated.room import Room
from kilobayes.federated.session import Session
from kilobayes.tree import plain

from .. import small
from .served import running

CLASSES = ["warm", "cold", "fresh"]
STEPS = [2, 4, 6]
SETTINGS = {
    "adapter": "LoRAXS(r=2)", "lr": 0.02, "batch_size": 8, "max_length": 24, "calibration": 0.3,
    "device": "cpu", "classes": "warm,cold,fresh", "steps": 6, "warmup_steps": 2, "every": 2,
    "scheme": "fedavg",
}  # fmt: skip


class Town:
    """A server and what users need to reach it."""

    def __init__(self, folder: Path, users: list[str], **given: Any) -> None:
        self.folder, self.given = folder, given
        self.options, self.together, _ = read(SETTINGS | {"model": small.base()}, "here")
        self.tokens = tokens.invite(folder, users)
        self.base = hosted(self.options, self.together, CLASSES)
        like, print_ = self.base.like, self.base.fingerprint
        plan = Plan(users, STEPS, Scheme("fedavg"), "auto", self.base.model, like, print_, **given)
        self.room = Room(plan, Ledger(folder, {}))
        users_ = tokens.read(folder)
        settings = {
            "options": dataclasses.asdict(self.options), "together": dataclasses.asdict(self.together),
            "classes": CLASSES, "fingerprint": print_, "reference": "", "users": len(users),
        }  # fmt: skip
        self.app = application(self.room, settings, users_, largest=1 << 20)

    def party(self, user: str, folder: Path) -> Party:
        rows = small.rows(40, sum(map(ord, user)))
        data = {"train": rows[:30], "test": rows[30:]}
        there = folder / "data" / user
        for split, own in data.items():
            small.write(there / f"{split}.jsonl", own)
        return gather(self.options, self.together, {user: str(there)}, folder / user, CLASSES)

    def session(self, server: str, user: str) -> Session:
        return Session(f"http://{server}", user, self.tokens[user], patience=30)

    def join(self, session: Session, party: Party) -> None:
        session.join({"rows": party.rows[0], "fingerprint": party.fingerprint, "reference": ""}, 1 << 20)


def follow(town: Town, server: str, user: str, folder: Path, until: int | None = None) -> Party:
    """A client's whole life, or as far as it has sent its update of a round."""
    party, session = town.party(user, folder), town.session(server, user)
    try:
        town.join(session, party)
        if until is None:
            client.follow(session, party, STEPS, Scheme("fedavg"))
        else:
            session.send_update(until, party.train(STEPS[until]), None)
    finally:
        session.close()
    return party


def test_who_was_absent_gets_its_latest_mixture_and_goes_on(tmp_path: Path) -> None:
    town = Town(tmp_path / "server", ["anna", "ben", "cara"], wait=3.0)
    with running(town.app) as served:
        left = follow(town, served.server, "cara", tmp_path, until=0)
        own = plain(left.update())
        others = [
            threading.Thread(target=follow, args=(town, served.server, user, tmp_path))
            for user in ("anna", "ben")
        ]
        for thread in others:
            thread.start()
        for thread in others:
            thread.join(200)
        assert town.room.over
        mixed = town.room.ledger.get("cara", "mixed", 0)
        assert mixed is not None
        back = town.party("cara", tmp_path)
        assert back.step == 2
        session = town.session(served.server, "cara")
        client._take(session, back, STEPS, 0, lambda line: None)
        adopted = {k: v.clone() for k, v in back.update().items()}
        assert back.adopted == 2
        client.follow(session, back, STEPS, Scheme("fedavg"))
        session.close()
    for key, value in adopted.items():
        torch.testing.assert_close(value, mixed[0][key])
        assert not torch.equal(value, own[key])
    assert back.step == 6
    lines = [json.loads(line) for line in (tmp_path / "server" / "rounds.jsonl").read_text().splitlines()]
    assert [line["refused"] for line in lines] == [{}, {"cara": "absent"}, {"cara": "absent"}]
    assert [line["trust"][2] for line in lines[1:]] == [[0.0, 0.0, 1.0]] * 2
    assert lines[1]["trust"][0][2] == 0.0


def test_who_lost_its_disk_begins_with_its_latest_mixture(tmp_path: Path) -> None:
    town = Town(tmp_path / "server", ["anna", "ben"])
    with running(town.app) as served:
        follow(town, served.server, "anna", tmp_path, until=0)
        follow(town, served.server, "ben", tmp_path, until=0)
        mixed = town.room.ledger.get("ben", "mixed", 0)
        fresh = town.party("ben", tmp_path / "new")
        session = town.session(served.server, "ben")
        client._take(session, fresh, STEPS, 0, lambda line: None)
        session.close()
    assert mixed is not None
    assert (fresh.step, fresh.adopted) == (0, 0)
    for key, value in fresh.update().items():
        torch.testing.assert_close(value, mixed[0][key])
    trained = fresh.train(1)
    assert max(float((v - mixed[0][k]).abs().max()) for k, v in trained.items()) < 0.2  # a step of Adam
