"""Flags of commands: those that several share, and one for each field of the options of training."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from kilobayes.options import Options, from_mapping
from kilobayes.run_yaml import read_yaml
from kilobayes.workflows.folder import resumed

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Run = Annotated[Path, typer.Argument(help="Folder of a run.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:0, ... or auto.")]
Samples = Annotated[int | None, typer.Option(min=1, help="Posterior samples; default the run's own.")]
Limit = Annotated[int | None, typer.Option(min=1, help="At most so many rows, drawn by class.")]
Model = Annotated[str | None, typer.Option(help="Where the base model is now, if it moved.")]
Text = Annotated[str | None, typer.Option(help="Column of the text.")]
Pair = Annotated[str | None, typer.Option(help="Column of the second text of a pair.")]
Label = Annotated[str | None, typer.Option(help="Column of the label.")]
Split = Annotated[str | None, typer.Option(help="Split of the data; default test, then validation.")]
Data = Annotated[str, typer.Option(help="Labelled data: a folder, a file or a hub id.")]
Ood = Annotated[str | None, typer.Option(help="Out-of-distribution data.")]
Coverage = Annotated[
    float | None, typer.Option(help="Sets of labels that hold the right one so often, as 0.9; needs MAPIE.")
]
Sets = Annotated[str, typer.Option(help="How sets are made: lac, aps, raps or top_k.")]
HeldOut = Annotated[
    str | None,
    typer.Option(help="Labelled rows for sets and errors, in place of the run's calibration rows."),
]


def flags_of(kind: type) -> list[inspect.Parameter]:
    """A flag for every field of a dataclass of settings, unset unless typed."""
    hints, parameters = get_type_hints(kind), []
    for f in dataclasses.fields(kind):
        spelled = [f"--{name}" for name in (f.name.replace("_", "-"), *f.metadata["aliases"])]
        shown = f.metadata["help"] + ("" if f.default in (None, "", False) else f" [default: {f.default}]")
        option = typer.Option(*spelled, help=shown, show_default=False)
        hint: Any = hints[f.name]
        hint = hint if type(None) in get_args(hint) else hint | None
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters.append(
            inspect.Parameter(f.name, keyword, default=None, annotation=Annotated[hint, option])
        )
    return parameters


def from_options(function: Any) -> Any:
    """Give a command one flag for every field of :class:`Options`, unset unless typed, and ``--config``."""
    parameters = flags_of(Options)
    config = Annotated[
        Path | None, typer.Option("--config", help="A flat run.yaml with the same keys; flags win.")
    ]
    own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "flags"]
    parameters.append(
        inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=config)
    )
    parameters += [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]

    def command(**given: Any) -> Any:
        rest = {p.name: given.pop(p.name) for p in own}
        file = given.pop("config")
        values = read_yaml(file) if file else _resumed(given)
        values |= from_mapping({k: v for k, v in given.items() if v is not None}, "the command line")
        return function(Options(**values), **rest)

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _resumed(given: dict[str, Any]) -> dict[str, Any]:
    return resumed(given["out"]) if given["resume"] and given["out"] else {}
