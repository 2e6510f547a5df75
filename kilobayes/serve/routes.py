"""What applications have in common: routes, counts, and errors as JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import Response

from kilobayes.errors import KilobayesError
from kilobayes.serve.guard import Refused, problem
from kilobayes.serve.metrics import Metrics

Routes = Mapping[str, Callable[..., Any]]


def add_routes(app: FastAPI, metrics: Metrics, shown: Routes, posted: Routes) -> None:
    """Adds what answers GET and POST by path, ``/metrics``, and the handlers of errors.

    Args:
        shown: without arguments.
        posted: of the request.
    """

    async def counts() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    for path, answer in {**shown, "/metrics": counts}.items():
        app.add_api_route(path, answer, methods=["GET"], response_model=None)
    for path, answer in posted.items():
        app.add_api_route(path, _posted(answer), methods=["POST"], response_model=None)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(KilobayesError, _mendable)
    app.add_exception_handler(HTTPException, _http)


def _posted(work: Any) -> Any:
    async def answer(request: Request) -> Any:
        return await work(request)

    return answer


async def _refused(request: Request, error: Any) -> Response:
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return _json(problem(error.status, error.message, kind), error.status, error.headers)


async def _mendable(request: Request, error: Any) -> Response:
    return _json(problem(400, str(error)), 400)


async def _http(request: Request, error: Any) -> Response:
    return _json(problem(error.status_code, str(error.detail)), error.status_code, error.headers)


def _json(body: bytes, status: int, headers: Any = None) -> Response:
    return Response(body, status_code=status, headers=dict(headers or {}), media_type="application/json")
