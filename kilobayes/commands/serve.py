"""``serve``: runs over HTTP; ``proxy``: sampled adapters of another server as one model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from kilobayes.commands.flags import Device, Model, Samples
from kilobayes.errors import KilobayesError

Host = Annotated[str, typer.Option(help="Address to listen on; others than loopback need a token.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")]
Token = Annotated[
    str, typer.Option(envvar="KILOBAYES_TOKEN", show_envvar=True, help="What clients must bear.")
]
MaxBody = Annotated[int, typer.Option(help="Bytes of a request.")]
Timeout = Annotated[float, typer.Option(help="Seconds that a request may take.")]


def serve(
    runs: Annotated[list[str], typer.Argument(help="Folders of runs, or NAME=FOLDER.")],
    host: Host = "127.0.0.1",
    port: Port = 8000,
    token: Token = "",
    samples: Samples = None,
    max_batch: Annotated[int, typer.Option(help="Rows of a forward.")] = 32,
    max_wait_ms: Annotated[float, typer.Option(help="How long a batch waits for more rows.")] = 5.0,
    max_queue: Annotated[int, typer.Option(help="Rows that may wait; more are refused.")] = 1024,
    max_body: MaxBody = 1 << 20,
    timeout: Timeout = 60.0,
    model: Model = None,
    device: Device = "auto",
) -> None:
    """Answer requests: labels and texts with their uncertainty, many runs over one base, and a page."""
    needed()
    from kilobayes.commands import console
    from kilobayes.serve import server
    from kilobayes.serve.shelf import load, named

    server.check(host, token)
    found = named(runs)
    from kilobayes.serve.app import application
    from kilobayes.serve.engine import Limits

    limits = Limits(max_batch, max_wait_ms / 1e3, max_queue, max_body, timeout)
    listening = server.listen(host, port)
    with listening:
        shelf = load(found, samples=samples, model=model, device=device, at_once=max_batch)
        app = application(shelf, limits, token=token, hosts=[] if token else server.names(host))
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listening.getsockname()[1]}"

        def ready() -> None:
            console.say(f"{len(shelf.names)} models: {', '.join(shelf.names)}\nserving at {address}")

        server.prepared(app, timeout, ready).run(sockets=[listening])
    console.say("stopped: all that was accepted is answered")


def needed() -> None:
    """Refuse to go on without what serving needs.

    Raises:
        KilobayesError: it is not installed.
    """
    for name in ("fastapi", "uvicorn", "prometheus_client", "httpx2"):
        if importlib.util.find_spec(name) is None:
            raise KilobayesError(
                f"this needs {name}", "which is not installed", 'pip install "kilobayes[serve]"', exit_code=3
            )


def proxy(
    samples: Annotated[Path, typer.Argument(help="Folder of kilobayes export --to samples.")],
    upstream: Annotated[str, typer.Option(help="Address of the server that has the adapters.")],
    host: Host = "127.0.0.1",
    port: Port = 8001,
    token: Token = "",
    upstream_token: Annotated[
        str,
        typer.Option(envvar="KILOBAYES_UPSTREAM_TOKEN", show_envvar=True, help="What that server asks for."),
    ] = "",
    max_body: MaxBody = 1 << 20,
    timeout: Timeout = 60.0,
) -> None:
    """Average over sampled adapters that an OpenAI-compatible server, such as vLLM, has."""
    needed()
    from kilobayes.commands import console
    from kilobayes.serve import server
    from kilobayes.serve.manifest import Manifest

    server.check(host, token)
    manifest = Manifest.read(samples)
    if not upstream.startswith(("http://", "https://")):
        raise KilobayesError("--upstream is an address", f"found {upstream!r}", "as in http://127.0.0.1:8000")
    import httpx2

    from kilobayes.serve.proxy import application

    bearer = {"authorization": f"Bearer {upstream_token}"} if upstream_token else {}
    client = httpx2.AsyncClient(
        base_url=upstream.rstrip("/").removesuffix("/v1"), headers=bearer, timeout=timeout
    )
    hosts = [] if token else server.names(host)
    with server.listen(host, port) as listening:
        app = application(manifest, client, token=token, hosts=hosts, max_body=max_body, timeout=timeout)
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listening.getsockname()[1]}"

        def ready() -> None:
            console.say(
                f"{manifest.name}: {len(manifest.members)} adapters of {upstream}\nserving at {address}"
            )

        server.prepared(app, timeout, ready).run(sockets=[listening])
