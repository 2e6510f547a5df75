"""The application: which path is answered by what."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import re
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.responses import HTMLResponse, Response

from kilobayes import __version__
from kilobayes.serve.answers import Service
from kilobayes.serve.classify import Predictions
from kilobayes.serve.completions import Completions
from kilobayes.serve.engine import Engine, Limits
from kilobayes.serve.guard import Guard
from kilobayes.serve.metrics import Metrics
from kilobayes.serve.routes import Routes, add_routes
from kilobayes.serve.shelf import Shelf
from kilobayes.tasks.prompt import CHOICES

PATHS = ("/", "/health", "/metrics", "/predict", "/v1/models", "/v1/completions", "/v1/chat/completions")


def application(
    shelf: Shelf, limits: Limits | None = None, *, token: str = "", hosts: Collection[str] = ()
) -> FastAPI:
    """The ASGI application; its lifespan starts and ends the thread of the models.

    Args:
        shelf: the runs.
        token: what every request but for the page and ``/health`` must bear; "" asks for none.
        hosts: names that the server may be asked by; empty allows any.
    """
    limits = limits or Limits()
    metrics = Metrics()
    engine = Engine(shelf, limits, metrics)
    service = Service(engine, limits)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            engine.close()
            service.close()

    app = FastAPI(title="kilobayes", version=__version__, lifespan=lifespan, openapi_url=None)
    app.state.engine = engine
    html, policy = page()

    async def show() -> Response:
        return HTMLResponse(html, headers={"content-security-policy": policy, "cache-control": "no-cache"})

    async def health() -> dict[str, Any]:
        return {"status": "ok", "version": __version__, "models": len(shelf.names)}

    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described(shelf, name) for name in shelf.names]}

    shown: Routes = {"/": show, "/health": health, "/v1/models": models}
    posted: Routes = {
        "/predict": Predictions(service),
        "/v1/completions": Completions(service, chat=False),
        "/v1/chat/completions": Completions(service, chat=True),
    }
    add_routes(app, metrics, shown, posted)
    app.add_middleware(
        Guard, metrics=metrics, token=token, hosts=hosts, paths=PATHS, max_body=limits.max_body,
        timeout=limits.timeout,
    )  # fmt: skip
    return app


def described(shelf: Shelf, name: str) -> dict[str, Any]:
    """A run as ``/v1/models`` lists it."""
    out: dict[str, Any] = {"id": name, "object": "model", "created": 0, "owned_by": "kilobayes"}
    if name in shelf.classifiers:
        fitted = shelf.fitted(name)
        card = fitted.card
        out |= {"task": card.task, "classes": list(card.classes), "paired": card.paired}
        if card.prompt is not None:
            own = [field for field in dict.fromkeys(card.prompt.fields) if field != CHOICES]
            options = CHOICES in card.prompt.fields or bool(card.scoring)
            out |= {"template": card.template, "fields": own, "options": options}
        out |= {"adapter": card.adapter, "posterior": card.posterior, "base": Path(card.base).name}
        return out | {"calibrated": fitted.calibration is not None}
    decoder, run = shelf.speakers[name]
    model = decoder.models[run]
    chat = bool(getattr(model.tokenizer, "chat_template", None))
    return out | {"task": "lm", "chat": chat, "posterior": repr(model.posterior), "longest": model.longest}


def page() -> tuple[str, str]:
    """The page, and a content security policy that allows what is in it and nothing else."""
    html = importlib.resources.files("kilobayes.serve").joinpath("page.html").read_text(encoding="utf-8")

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digests = (hashlib.sha256(part.encode()).digest() for part in found)
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    policy = (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy
