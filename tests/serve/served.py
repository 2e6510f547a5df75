"""A server in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2


class Served:
    """A running ``kilobayes serve``.

    Attributes:
        address: such as ``http://127.0.0.1:40001``.
    """

    def __init__(self, process: subprocess.Popen[str], address: str) -> None:
        self.process, self.address = process, address
        self.port = int(address.rpartition(":")[2])

    def under_way(self) -> int:
        """Requests accepted and not answered, the one that asks aside."""
        text = httpx2.get(f"{self.address}/metrics", timeout=30).text
        return int(float(re.findall(r"^kilobayes_requests_under_way (.*)$", text, re.MULTILINE)[0])) - 1

    def end(self) -> int:
        """Ask it to end; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


@contextmanager
def serve(folder: Path, *words: str, runs: tuple[str, ...] = ("a", "b", "one", "two")) -> Iterator[Served]:
    """Within it, a server of some runs on a free port."""
    command = [sys.executable, "-m", "kilobayes.cli", "serve", *(str(folder / run) for run in runs)]
    process = subprocess.Popen(
        [*command, "--port", "0", "--device", "cpu", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    lines: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if "serving at" in line:
                break
        assert lines, process.wait()
        assert "serving at" in lines[-1], "".join(lines)
        yield Served(process, lines[-1].split()[-1])
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
        process.stdout.close() if process.stdout else None


def until(holds: object, seconds: float = 30.0) -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)
