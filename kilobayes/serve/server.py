"""From an application to a listening process that ends well."""

from __future__ import annotations

import contextlib
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn

from kilobayes.errors import KilobayesError


class Server(uvicorn.Server):
    """uvicorn's, which on SIGTERM or Ctrl-C answers what it has accepted, and then returns.

    uvicorn's own raises the signal again when it is done, so that the process would end as if killed. A
    second signal ends it at once.
    """

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Within it, signals ask the server to end; outside of the main thread Python has none."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {each: signal.signal(each, self._asked) for each in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def _asked(self, number: int, frame: Any) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True


def loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def names(host: str) -> list[str]:
    """What a server at a loopback address may be called by those who ask it."""
    return ["localhost", "127.0.0.1", "::1", host] if loopback(host) else []


def check(host: str, token: str) -> None:
    """Refuse to listen to others without a token.

    Raises:
        KilobayesError: the address is not loopback, and there is no token.
    """
    if token and (not token.isascii() or token != token.strip() or len(token) < 8):
        raise KilobayesError("a token is at least 8 ASCII characters, without spaces around", "found another")
    if not loopback(host) and not token:
        raise KilobayesError(
            f"--host {host} lets other machines in, and there is no token",
            remedy="set KILOBAYES_TOKEN or --token, or stay on --host 127.0.0.1",
        )


def listen(host: str, port: int) -> socket.socket:
    """A socket that is listened on; port 0 takes a free one.

    Raises:
        KilobayesError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    out = socket.socket(family)
    try:
        out.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        out.bind((host, port))
    except (OSError, OverflowError) as error:
        out.close()
        found = getattr(error, "strerror", None) or str(error)
        raise KilobayesError(f"{host}, port {port}, cannot be had", found, "as in --port 8001") from None
    return out


def prepared(
    app: Any, timeout: float, ready: Callable[[], None], *, tls: tuple[Path, Path] | None = None
) -> Server:
    """What serves an application: its ``run(sockets=[listening])`` returns when all accepted is answered.

    Args:
        timeout: seconds that a request may take.
        ready: called when requests are taken.
        tls: PEM files of a certificate and its key; None for plain HTTP.
    """
    certificate, key = tls or (None, None)
    config = uvicorn.Config(
        app, log_config=None, log_level="warning", access_log=False, server_header=False, lifespan="on",
        timeout_graceful_shutdown=int(timeout) + 5, ws="none", proxy_headers=False,
        ssl_certfile=certificate, ssl_keyfile=key,
    )  # fmt: skip
    out = Server(config)
    started = out.startup

    async def startup(sockets: Any = None) -> None:
        await started(sockets=sockets)
        if not out.should_exit:
            ready()

    out.startup = startup  # type: ignore[method-assign]
    return out
