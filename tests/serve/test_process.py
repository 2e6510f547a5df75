"""The command in a process of its own: slow clients, ending, and what it refuses to start with."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from kilobayes import cli

from .served import Served, serve, until

ONE = {"model": "a", "texts": ["red", "blue w1"]}


def post(served: Served, path: str, body: Any) -> httpx2.Response:
    return httpx2.post(f"{served.address}{path}", json=body, timeout=60)


def test_slow_clients_are_let_go_and_ending_loses_nothing_that_was_accepted(folder: Path) -> None:
    with serve(folder, "--max-wait-ms", "1500", "--max-batch", "1000", "--timeout", "8") as served:
        slow = socket.create_connection(("127.0.0.1", served.port))
        slow.settimeout(30)
        head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        slow.sendall(head + b'Content-Length: 500\r\n\r\n{"texts": ')
        silent = socket.create_connection(("127.0.0.1", served.port))
        with ThreadPoolExecutor(14) as pool:
            asked = {"model": "one", "prompt": "a dog", "max_tokens": 50, "stream": True}
            texts = [pool.submit(post, served, "/v1/completions", asked) for _ in range(2)]
            labels = [pool.submit(post, served, "/predict", ONE | {"model": "ab"[i % 2]}) for i in range(12)]
            # the batch waits a second and a half, so all of them have been accepted and none answered
            until(lambda: served.under_way() >= 13)
            assert not any(label.done() for label in labels)
            assert slow.recv(1000).split()[1] == b"408"
            again = [pool.submit(post, served, "/predict", ONE) for _ in range(8)]
            until(lambda: served.under_way() >= 8)
            assert not any(one.done() for one in again)
            code = served.end()
            assert [one.result().status_code for one in [*labels, *again, *texts]] == [200] * 22
            assert all(len(one.result().json()["results"]) == 2 for one in [*labels, *again])
            assert all(text.result().text.endswith("data: [DONE]\n\n") for text in texts)
        assert code == 0
        with pytest.raises(httpx2.ConnectError):
            post(served, "/predict", ONE)
        slow.close()
        silent.close()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "0.0.0.0"], "KILOBAYES_TOKEN"),
        (["--host", "192.168.0.1"], "lets other machines in"),
        (["--token", "short"], "at least 8"),
        (["--host", "nowhere.invalid", "--token", "long enough"], "cannot be had"),
        (["--max-batch", "0"], "--max-batch must be at least 1"),
        (["--timeout", "0"], "must be positive"),
        ([], "two runs are called run"),
    ],
)
def test_it_refuses_to_start(words: list[str], said: str, tmp_path: Path, capsys: Any) -> None:
    runs = [str(tmp_path / "run")] * (1 if words else 2)
    assert cli.run(["serve", *runs, *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("error: ")


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(tmp_path: Path, capsys: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.run(["serve", str(tmp_path / "run"), "--port", str(port)]) == 2
    assert f"port {port}, cannot be had" in capsys.readouterr().err
