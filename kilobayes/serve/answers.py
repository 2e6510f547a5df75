"""Waiting for the engine: until a request's answer, its time's end, or its client's leaving."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Request

from kilobayes.errors import KilobayesError
from kilobayes.serve.bodies import Kind, read
from kilobayes.serve.engine import Engine, Limits
from kilobayes.serve.guard import Refused
from kilobayes.serve.queue import Full

Result = TypeVar("Result")


class Service:
    """What the endpoints share.

    Args:
        engine: started and closed by the application.
    """

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self.engine, self.limits = engine, limits
        self.shelf, self.metrics = engine.shelf, engine.metrics
        # tokenizers are not for several threads at once, nor is the making of sets
        self._aside = ThreadPoolExecutor(1, "tokens")

    def close(self) -> None:
        self._aside.shutdown()

    async def body(self, request: Request, kind: type[Kind]) -> Kind:
        """The request's body, checked; a long one not in the thread that serves others."""
        raw = await request.body()
        return await self.aside(lambda: read(kind, raw))

    async def aside(self, work: Callable[[], Result]) -> Result:
        """The result of something that takes time; what a person can mend becomes status 400."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._aside, work)
        except KilobayesError as error:
            raise Refused(400, str(error)) from None

    def chosen(self, name: str | None, known: dict[str, Any], what: str) -> str:
        """The run that is asked for; the only one where none is named."""
        if name is None and len(known) == 1:
            return next(iter(known))
        if name in known:
            return str(name)
        if name is None:
            raise Refused(400, f"name a model; {what}: {', '.join(known) or 'none'}")
        raise Refused(404, f"there is no model {name!r:.80} here; {what}: {', '.join(known) or 'none'}")

    def put(self, work: Callable[[], Result]) -> Result:
        """Hand something to the engine, which may be full."""
        try:
            return work()
        except Full:
            raise Refused(
                429, f"{self.engine.queued} rows wait already; try again", {"retry-after": "1"}
            ) from None

    async def until(self, request: Request, answer: Awaitable[Result]) -> Result:
        """An answer within the time that a request may take; it is cancelled if the client goes away."""
        task = asyncio.ensure_future(answer)
        gone = asyncio.ensure_future(left(request))
        try:
            done, _ = await asyncio.wait(
                (task, gone), timeout=self.limits.timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if task in done:
                return task.result()
            if gone in done:
                raise Refused(499, "the client went away")
            raise Refused(504, f"not answered within {self.limits.timeout:g} s; send less, or try again")
        finally:
            for part in (task, gone):
                part.cancel()


async def left(request: Request) -> None:
    """Returns when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
