"""What every request passes: who may ask, how large and how slow it may be, and what is counted."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Collection, Mapping
from typing import Any

from kilobayes.serve.metrics import Metrics

log = logging.getLogger("kilobayes.serve")

OPEN = ("/", "/health")  # need no token
DRAINED = 1 << 24  # bytes that are read of a body that is refused, so that the answer arrives
HEADERS = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "cache-control": "no-store"}


def problem(status: int, message: str, kind: str = "invalid_request_error", code: str | None = None) -> bytes:
    """An error as OpenAI's API words it."""
    return json.dumps(
        {"error": {"message": message, "type": kind, "param": None, "code": code or str(status)}}
    ).encode()


class Refused(Exception):
    """A request that ends with an error.

    Args:
        status: HTTP status.
        headers: such as ``Retry-After``.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        self.status, self.message, self.headers = status, message, dict(headers or {})
        super().__init__(message)


class Guard:
    """ASGI middleware around the application.

    Args:
        token: what ``Authorization: Bearer`` must say; "" lets everybody in.
        hosts: names that the ``Host`` header may say, so that a page of another origin cannot reach a server
            without a token by a name that it points here; empty allows any.
        paths: those that are counted by name.
    """

    def __init__(
        self,
        app: Any,
        metrics: Metrics,
        *,
        token: str = "",
        hosts: Collection[str] = (),
        paths: Collection[str] = (),
        max_body: int = 1 << 20,
        timeout: float = 60.0,
    ) -> None:
        self.app, self.metrics, self.token, self.hosts = app, metrics, token, set(hosts)
        self.paths, self.max_body, self.timeout = set(paths), max_body, timeout

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self.paths else "other"
        start, status = time.perf_counter(), 0
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}

        async def counted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = {key.decode("latin-1").lower() for key, _ in message["headers"]}
                added = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k not in given]
                message["headers"] = [*message["headers"], *added]
            await send(message)

        self.metrics.under_way.inc()
        try:
            self._check(scope, headers)
            replay = await self._body(headers, receive) if scope["method"] == "POST" else receive
            await self.app(scope, replay, counted)
        except Refused as refused:
            if not status:
                await _answer(counted, refused)
        except Exception:
            log.exception("a request failed")
            if not status:
                await _answer(counted, Refused(500, "the server failed; its log says how"))
        finally:
            self.metrics.under_way.dec()
            self.metrics.requests.labels(path, str(status or 499)).inc()  # 499: the client went away
            self.metrics.seconds.labels(path).observe(time.perf_counter() - start)

    def _check(self, scope: Any, headers: Mapping[str, str]) -> None:
        host = headers.get("host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self.hosts and name.strip("[]").lower() not in self.hosts:
            raise Refused(421, f"this server is not called {host!r:.80}")
        if self.token and scope["path"] not in OPEN:
            given = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
                raise Refused(
                    401, "a token is needed: Authorization: Bearer TOKEN", {"www-authenticate": "Bearer"}
                )

    async def _body(self, headers: Mapping[str, str], receive: Any) -> Any:
        """The whole body, within its limits, to be received again."""
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(400, "the client went away")
                    size += len(message.get("body", b""))
                    if size <= self.max_body:
                        parts.append(message.get("body", b""))
                    if not message.get("more_body") or size > DRAINED:
                        break
        except TimeoutError:
            raise Refused(408, "the body did not arrive in time", {"connection": "close"}) from None
        if size > self.max_body:
            raise Refused(
                413,
                f"the body has more than {self.max_body} bytes; send fewer texts",
                {"connection": "close"},
            )
        if kind != "application/json":  # so that forms of other sites' pages are refused by their browsers
            raise Refused(415, "send JSON, with Content-Type: application/json")
        whole = {"type": "http.request", "body": b"".join(parts), "more_body": False}
        given = False

        async def again() -> Any:
            nonlocal given
            if given:
                return await receive()
            given = True
            return whole

        return again


async def _answer(send: Any, refused: Refused) -> None:
    body = problem(
        refused.status, refused.message, "server_error" if refused.status >= 500 else "invalid_request_error"
    )
    headers = {"content-type": "application/json", "content-length": str(len(body))} | refused.headers
    raw = [(key.encode(), value.encode()) for key, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
