"""What every request to a server passes: who asks, and how large and how slow a body may be."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

from kilobayes.federated import tokens

log = logging.getLogger("kilobayes.federated")

USER = "kilobayes-user"  # header
DRAINED = 1 << 24  # bytes that are read of a body that is refused, so that the answer arrives


class Door:
    """ASGI middleware: nothing is answered to whom is not invited, not even what there is.

    Args:
        users: digests of tokens by user.
        largest: bytes of a body.
        timeout: seconds that a body may take.
    """

    def __init__(self, app: Any, users: dict[str, str], largest: int, timeout: float) -> None:
        self.app, self.users, self.largest, self.timeout = app, users, largest, timeout

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = False

        async def noted(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
            user, token = headers.get(USER, ""), headers.get("authorization", "")
            if not tokens.admitted(self.users, user, token.removeprefix("Bearer ")):
                await answer(send, 401, "this is not the user's token", close=True)
                return
            scope["kilobayes_user"] = user
            told = headers.get("content-length", "0")
            if told.isdigit() and int(told) > self.largest + DRAINED:
                await answer(send, 413, f"the body has more than {self.largest} bytes", close=True)
                return
            body = await self._body(receive) if scope["method"] == "POST" else b""
            if isinstance(body, tuple):
                await answer(send, *body, close=True)
                return
            scope["kilobayes_body"] = body
            await self.app(scope, receive, noted)
        except Exception:
            log.exception("a request failed")
            if not begun:
                await answer(send, 500, "the server failed; its log says how")

    async def _body(self, receive: Callable[[], Any]) -> bytes | tuple[int, str]:
        """The whole body, or why it is refused."""
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return 400, "the client went away"
                    size += len(message.get("body", b""))
                    if size <= self.largest:
                        parts.append(message.get("body", b""))
                    if not message.get("more_body") or size > self.largest + DRAINED:
                        break
        except TimeoutError:
            return 408, "the body did not arrive in time"
        if size > self.largest:
            return 413, f"the body has more than {self.largest} bytes"
        return b"".join(parts)


async def answer(send: Any, status: int, wrong: str, *, close: bool = False) -> None:
    """An error as a JSON object."""
    body = json.dumps({"error": wrong}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"connection", b"close")] if close else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
