"""``collaborate``: users who train for themselves and average with whom it pays."""

from __future__ import annotations

import inspect
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from kilobayes.collaboration.settings import APART, Together, read
from kilobayes.commands.flags import flags_of
from kilobayes.errors import KilobayesError
from kilobayes.options import Options
from kilobayes.run_yaml import read_flat


def _collaborate(settings: Path | None, users: str | None, as_json: bool, given: dict[str, Any]) -> None:
    given = {k: v for k, v in given.items() if v is not None}
    values: dict[str, Any] = {}
    out = given.get("out", "runs/collaboration")
    if settings is None and given.get("resume"):
        settings = Path(out) / "collaborate.yaml"
    if settings is not None:
        values = {str(k).replace("-", "_"): v for k, v in read_flat(settings).items()}
    where = str(settings) if settings else "the command line"
    options, together, people = read(values | given | ({"users": users} if users else {}), where)
    if not people:
        raise KilobayesError("no users are named", remedy="as in --users people, a folder of theirs")
    from kilobayes.commands import console
    from kilobayes.workflows.collaborate import collaborate as work

    try:
        with console.bar("training") as watch:
            done = work(options, together, people, watch=watch, say=console.say)
    except KeyboardInterrupt:
        words = ["kilobayes", "collaborate", "--resume", "--out", out]
        console.say(f"stopped, with a checkpoint if a step was taken; to go on, type\n  {shlex.join(words)}")
        raise SystemExit(130) from None
    for name, figures in zip(done.names, done.figures, strict=True):
        console.say(f"{name:>20}  " + "  ".join(f"{k} {v:.4g}" for k, v in figures.items()))
    console.say(f"worst: {done.worst}; page: {done.folder / 'README.md'}")
    console.say(f"next:   kilobayes evaluate {done.folder / 'users' / done.names[0]} --data ...")
    if as_json:
        found = dict(zip(done.names, done.figures, strict=True))
        told = {"folder": str(done.folder), "users": found, "worst": done.worst}
        console.result(told | {"trust": done.trust[-1].tolist()})


def collaborate(
    settings: Annotated[
        Path | None, typer.Argument(help="A flat YAML file with the flags below as keys; flags win.")
    ] = None,
    *,
    users: Annotated[
        str | None, typer.Option(help="A folder with a folder or file of data for each user.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
    **given: Any,
) -> None:
    """Train users together, each to a model of its own: trust, averages, personal adapters."""
    _collaborate(settings, users, json_, given)


def _with_flags(function: Any) -> Any:
    own = list(inspect.signature(function, eval_str=True).parameters.values())[:-1]
    rest = [p for p in flags_of(Options) if p.name not in APART]
    every = [*own, *flags_of(Together), *rest]
    function.__signature__ = inspect.Signature(every)
    function.__annotations__ = {p.name: p.annotation for p in every}
    return function


_with_flags(collaborate)
