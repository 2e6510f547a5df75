"""A room over HTTP: routes, and the clock that closes rounds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from kilobayes import __version__
from kilobayes.errors import KilobayesError
from kilobayes.federated import wire
from kilobayes.federated.closing import Late
from kilobayes.federated.door import Door
from kilobayes.federated.ledger import LOSSES
from kilobayes.federated.room import Room

PATIENCE = 10.0  # seconds that a request waits for something to come about
GLANCE = 0.05  # seconds between looks


def application(
    room: Room,
    settings: dict[str, Any],
    users: dict[str, str],
    *,
    largest: int,
    timeout: float = 120.0,
    ended: Callable[[], None] = lambda: None,
    stopping: Callable[[], bool] = lambda: False,
) -> FastAPI:
    """The ASGI application.

    Args:
        settings: what clients train by.
        users: digests of tokens by user.
        largest: bytes of a body.
        timeout: seconds that a body may take.
        ended: called when all users have all that they will get.
        stopping: whether the server is about to end, so that nobody is kept waiting.
    """

    async def clock() -> None:
        while True:
            await asyncio.to_thread(room.tick)
            if room.emptied:
                ended()
            await asyncio.sleep(0.2)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(clock())
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    async def until(holds: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not holds() and not stopping() and time.monotonic() < end:
            await asyncio.sleep(GLANCE)

    async def get_settings(request: Request) -> Any:
        return settings | {"version": __version__}

    async def join(request: Request) -> Any:
        hello = wire.read_json(request.scope["kilobayes_body"])
        await asyncio.to_thread(room.join, _user(request), hello)
        return await asyncio.to_thread(room.status, _user(request))

    async def status(request: Request) -> Any:
        return await asyncio.to_thread(room.status, _user(request))

    async def update(request: Request, at: int) -> Any:
        await asyncio.to_thread(room.update, _user(request), at, request.scope["kilobayes_body"])
        return {}

    async def losses(request: Request, at: int) -> Any:
        await asyncio.to_thread(room.scored, _user(request), at, request.scope["kilobayes_body"])
        return {}

    async def updates(request: Request, at: int) -> Any:
        state = room.state
        await until(lambda: state.round != at or state.phase == LOSSES)
        if (state.round, state.phase) != (at, LOSSES):
            return await status(request)
        return _tensors(await asyncio.to_thread(room.everyone, _user(request), at))

    async def mixed(request: Request, at: int) -> Any:
        await until(lambda: room.state.round > at)
        if room.state.round <= at:
            return await status(request)
        found = await asyncio.to_thread(room.mixed, _user(request), at)
        return Response(status_code=204) if found is None else _tensors(found)

    async def done(request: Request) -> Any:
        await asyncio.to_thread(room.leave, _user(request))
        return {}

    app = FastAPI(title="kilobayes server", lifespan=lifespan, openapi_url=None)
    for path, handler in {"/v1/settings": get_settings, "/v1/status": status}.items():
        app.add_api_route(path, handler, response_model=None)
    app.add_api_route("/v1/rounds/{at}/updates", updates, response_model=None)
    app.add_api_route("/v1/rounds/{at}/mixed", mixed, response_model=None)
    for path, handler in {"/v1/join": join, "/v1/done": done}.items():
        app.add_api_route(path, handler, methods=["POST"], response_model=None)
    app.add_api_route("/v1/rounds/{at}/update", update, methods=["POST"], response_model=None)
    app.add_api_route("/v1/rounds/{at}/losses", losses, methods=["POST"], response_model=None)
    app.add_exception_handler(Late, _late)
    app.add_exception_handler(KilobayesError, _wrong)
    app.add_middleware(Door, users=users, largest=largest, timeout=timeout)
    return app


def _user(request: Request) -> str:
    return str(request.scope["kilobayes_user"])


def _tensors(body: bytes) -> Response:
    return Response(body, media_type=wire.TENSORS)


async def _late(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "this round is not open for that"}, status_code=409)


async def _wrong(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, status_code=422)
