"""A server in a thread of this process, over TLS."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kilobayes.serve.server import listen, prepared


class Running:
    """An application that is listened for.

    Attributes:
        server: its address, as ``--server`` takes it.
    """

    def __init__(self, app: Any, tls: tuple[Path, Path] | None, port: int = 0) -> None:
        self.socket = listen("127.0.0.1", port)
        self.port = int(self.socket.getsockname()[1])
        self.server = f"localhost:{self.port}"
        ready = threading.Event()
        self.uvicorn = prepared(app, 1.0, ready.set, tls=tls)
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [self.socket]})
        self.thread.start()
        assert ready.wait(60)

    def end(self) -> None:
        self.uvicorn.should_exit = True
        self.thread.join(60)
        self.socket.close()


@contextmanager
def running(app: Any, tls: tuple[Path, Path] | None = None, port: int = 0) -> Iterator[Running]:
    """Within it, the application answers."""
    found = Running(app, tls, port)
    try:
        yield found
    finally:
        found.end()
