"""A server and four clients, each a process of its own, over TLS: the same result as in one process."""

from __future__ import annotations

import json
import multiprocessing
import runpy
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx2")

from kilobayes.collaboration.settings import read
from kilobayes.federated import certificates, tokens
from kilobayes.run_yaml import read_flat
from kilobayes.workflows.collaborate import collaborate

from .. import small

PROGRAM = str(Path(__file__).parents[1] / "programs" / "command.py")
USERS = ["anna", "ben", "cara", "dave"]
SETTINGS = {
    "adapter": "LoRA(r=2)", "lr": 0.02, "batch_size": 8, "max_length": 24, "calibration": 0.3,
    "device": "cpu", "classes": "warm,cold,fresh", "steps": 9, "warmup_steps": 3, "every": 3,
}  # fmt: skip
MOMENTS = {"share": "moments", "posterior": "SWAG(rank=0, start=0.2)", "adapter": "LoRAXS(r=3)"}
IMPORTED = [
    "kilobayes.cli", "kilobayes.federated.app", "kilobayes.federated.base", "kilobayes.federated.client",
    "transformers.models.bert.modeling_bert", "uvicorn",
]  # fmt: skip
PATIENT = 240.0  # seconds; processes share two cores with other tests


class Machines:
    """Processes of one test, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.all = folder, list[Any]()
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(IMPORTED)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            self.port = taken.getsockname()[1]
        self.certificate, _ = certificates.make(folder / "server", ["localhost", "127.0.0.1"])
        self.tokens = tokens.invite(folder / "server", USERS)

    def start(self, name: str, *words: str) -> Any:
        given = {"words": list(words), "log": str(self.folder / f"{name}.log")}
        process = self.context.Process(
            target=runpy.run_path, args=(PROGRAM, given, "__main__"), daemon=True, name=name
        )
        process.start()
        self.all.append(process)
        return process

    def server(self) -> Any:
        where = ["--out", str(self.folder / "server"), "--port", str(self.port), "--device", "cpu"]
        return self.start("server", "server", str(self.folder / "run.yaml"), *where)

    def client(self, user: str, *words: str) -> Any:
        who = ["--user", user, "--token", self.tokens[user], "--data", str(self.folder / "people" / user)]
        where = ["--server", f"localhost:{self.port}", "--certificate", str(self.certificate)]
        rest = ["--out", str(self.folder / "runs" / user), "--device", "cpu", *words]
        return self.start(user, "client", *who, *where, *rest)

    def ended(self, process: Any) -> None:
        process.join(PATIENT)
        assert process.exitcode == 0, (self.folder / f"{process.name}.log").read_text()

    def until(self, holds: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENT
        while not holds():
            logs = {path.name: path.read_text() for path in self.folder.glob("*.log")}
            assert time.monotonic() < end, logs
            assert all(p.exitcode in (None, 0, -signal.SIGKILL) for p in self.all), logs
            time.sleep(0.01)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    for i, user in enumerate(USERS):
        folder = tmp_path / "people" / user
        small.write(folder / "train.jsonl", small.rows(30 + 10 * i, 10 + i))
        small.write(folder / "test.jsonl", small.rows(20, 20 + i))
    found = Machines(tmp_path)
    yield found
    for process in found.all:
        if process.exitcode is None:
            process.kill()
            process.join()


def settings(folder: Path, scheme: str, **more: Any) -> None:
    small.write(folder / "shared.jsonl", [{"text": row["text"]} for row in small.rows(40, 99)])
    whole = SETTINGS | {"scheme": scheme, "model": small.base()} | more
    whole |= {"reference": str(folder / "shared.jsonl")} if scheme == "predictions" else {}
    (folder / "run.yaml").write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in whole.items()))


def simulated(folder: Path) -> list[dict[str, Any]]:
    """The same in one process; its rounds."""
    flat = read_flat(folder / "run.yaml")
    options, together, _ = read(dict(flat) | {"out": str(folder / "simulation")}, "run.yaml")
    return collaborate(options, together, folder / "people").rounds


def compare(folder: Path) -> None:
    """Adapters and matrices of trust are those of one process, up to rounding."""
    expected = simulated(folder)
    lines = [json.loads(line) for line in (folder / "server" / "rounds.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [line["step"] for line in expected] == [3, 6, 9]
    for line, other in zip(lines, expected, strict=True):
        torch.testing.assert_close(
            torch.tensor(line["trust"]), torch.tensor(other["trust"]), atol=2e-4, rtol=0
        )
        assert line["refused"] == {}
    moved = 0.0
    for user in USERS:
        for file in ("adapter_model.safetensors", "posterior.safetensors"):
            ours = load_file(folder / "runs" / user / file)
            theirs = load_file(folder / "simulation" / "users" / user / file)
            assert ours.keys() == theirs.keys()
            for key, value in ours.items():
                torch.testing.assert_close(value, theirs[key], atol=2e-4, rtol=2e-3)
                if value.numel():
                    largest = float(theirs[key].abs().max())  # variances are small: to their own scale, too
                    torch.testing.assert_close(value, theirs[key], atol=4e-3 * largest, rtol=0)
                    moved = max(moved, largest)
    assert moved > 0.01


def test_server_and_clients_are_killed_and_nothing_is_lost(machines: Machines) -> None:
    folder = machines.folder
    settings(folder, "validation")
    server = machines.server()
    clients = {user: machines.client(user) for user in USERS[:3]}
    sent = folder / "server" / "users"
    machines.until(lambda: all((sent / user / "update.safetensors").exists() for user in USERS[:3]))
    server.kill()  # three have sent, the fourth has not come yet
    server.join()
    server = machines.server()
    clients["dave"] = machines.client("dave")
    machines.until((folder / "server" / "rounds.jsonl").exists)
    clients["dave"].kill()
    clients["dave"].join()
    clients["dave"] = machines.client("dave")
    for process in (*clients.values(), server):
        machines.ended(process)
    compare(folder)
    assert "is back" in (folder / "anna.log").read_text()
    said = (folder / "server.log").read_text()
    assert "round 3 of 3: 4 users; " in said
    assert "over: every user has the last mixture" in said
    assert not any(token in said for token in machines.tokens.values())


@pytest.mark.e2e
@pytest.mark.parametrize(("scheme", "more"), [("weights", MOMENTS), ("predictions", {})])
def test_other_schemes_are_those_of_one_process(
    machines: Machines, scheme: str, more: dict[str, Any]
) -> None:
    settings(machines.folder, scheme, **more)
    server = machines.server()
    words = ["--reference", str(machines.folder / "shared.jsonl")] if scheme == "predictions" else []
    clients = [machines.client(user, *words) for user in USERS]
    for process in (*clients, server):
        machines.ended(process)
    compare(machines.folder)
