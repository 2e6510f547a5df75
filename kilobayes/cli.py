"""The command line: one function per command, its signature its flags; nothing heavy is imported before a command runs."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from kilobayes.errors import KilobayesError
from kilobayes.options import Options, from_mapping, read_yaml

app = typer.Typer(
    name="kilobayes",
    help="Fine-tune language models with adapters of kilobytes that carry a Bayesian posterior.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Run = Annotated[Path, typer.Argument(help="Folder of a run.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:0, ... or auto.")]
Samples = Annotated[int | None, typer.Option(help="Posterior samples; default the run's own.")]


def from_options(function: Any) -> Any:
    """Give a command one flag for every field of :class:`Options`, unset unless typed, and ``--config``."""
    hints = get_type_hints(Options)
    parameters = []
    for f in dataclasses.fields(Options):
        flag = "--" + f.name.replace("_", "-")
        spelled = [flag, *(f"--{a}" for a in f.metadata["aliases"]), *(f"--{a.replace('-', '_')}" for a in f.metadata["aliases"])]
        kind = hints[f.name]
        shown = f.metadata["help"] + ("" if f.default in (None, "", False) else f" [default: {f.default}]")
        option = typer.Option(*spelled, help=shown, show_default=False)
        annotation = Annotated[kind if kind == (str | None) or kind == (int | None) else kind | None, option]
        parameters.append(inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    config = Annotated[Path | None, typer.Option("--config", help="A flat run.yaml with the same keys; flags win.")]
    own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "flags"]
    parameters.append(inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=config))
    parameters += [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]

    def command(**given: Any) -> Any:
        rest = {p.name: given.pop(p.name) for p in own}
        file = given.pop("config")
        values = read_yaml(file) if file else {}
        values |= from_mapping({k: v for k, v in given.items() if v is not None}, "the command line")
        return function(Options(**values), **rest)

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the demonstration.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    quick: Annotated[bool, typer.Option(help="A third of the data and of the training.")] = False,
) -> None:
    """Fine-tune a real encoder on real text, with and without a posterior, and compare: a few minutes, offline."""
    from kilobayes.commands import demo as run

    run.demo(out, seed=seed, quick=quick)


@app.command()
@from_options
def train(flags: Options, json_: Json = False) -> None:
    """Fine-tune, fit the posterior, calibrate, evaluate and report."""
    from kilobayes.commands import runs

    runs.train(flags, as_json=json_)


@app.command()
@from_options
def check(flags: Options, json_: Json = False) -> None:
    """Validate settings and data without training or loading the model."""
    from kilobayes.commands import inspect as run

    run.check(flags, as_json=json_)


@app.command()
def predict(
    run: Run,
    input: Annotated[str, typer.Option(help="Texts: JSONL(.gz), CSV, TSV or Parquet; - reads JSONL from standard input.")],
    output: Annotated[str, typer.Option(help="Where to write, as JSONL or .csv; - is standard output.")] = "-",
    text_column: Annotated[str | None, typer.Option(help="Column of the text.")] = None,
    pair_column: Annotated[str | None, typer.Option(help="Column of the second text of a pair.")] = None,
    samples: Samples = None,
    batch_size: Annotated[int, typer.Option(help="Rows of a forward.")] = 32,
    model: Annotated[str | None, typer.Option(help="Where the base model is now, if it moved.")] = None,
    device: Device = "auto",
) -> None:
    """Label, probabilities, confidence, entropy and mutual information of every row, in order."""
    from kilobayes.commands import runs

    runs.predict(run, input, output, text_column, pair_column, samples, batch_size, model, device)


@app.command()
def evaluate(
    run: Run,
    data: Annotated[str, typer.Option(help="Labelled data: a folder, a file or a hub id.")],
    split: Annotated[str | None, typer.Option(help="Split of the data; default test, then validation.")] = None,
    ood: Annotated[str | None, typer.Option(help="Out-of-distribution data.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of the text.")] = None,
    pair_column: Annotated[str | None, typer.Option(help="Column of the second text of a pair.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the label.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many rows, drawn by class.")] = None,
    samples: Samples = None,
    out: Annotated[Path | None, typer.Option(help="Folder for metrics.json, report.html and predictions.jsonl.")] = None,
    model: Annotated[str | None, typer.Option(help="Where the base model is now, if it moved.")] = None,
    device: Device = "auto",
    json_: Json = False,
) -> None:
    """Accuracy, calibration and uncertainty of a run on labelled data."""
    from kilobayes.commands import runs

    columns = {"text_column": text_column, "pair_column": pair_column, "label_column": label_column}
    runs.evaluate(run, data, split, ood, columns, limit, samples, out, model, device, as_json=json_)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    data: Annotated[str, typer.Option(help="Labelled data that all are evaluated on.")],
    split: Annotated[str | None, typer.Option(help="Split of the data; default test, then validation.")] = None,
    ood: Annotated[str | None, typer.Option(help="Out-of-distribution data.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the label.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many rows, drawn by class.")] = None,
    samples: Samples = None,
    out: Annotated[Path, typer.Option(help="Folder for the table and the report.")] = Path("runs/compare"),
    model: Annotated[str | None, typer.Option(help="Where the base model is now, if it moved.")] = None,
    device: Device = "auto",
    json_: Json = False,
) -> None:
    """Several runs on the same rows: one table and one report; runs that differ in the seed alone are pooled."""
    from kilobayes.commands import runs as command

    command.compare(runs, data, split, ood, label_column, limit, samples, out, model, device, as_json=json_)


@app.command()
def export(
    run: Run,
    to: Annotated[str, typer.Option(help="lora: plain PEFT LoRA of the mean; merged: the model with the mean merged.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    member: Annotated[int, typer.Option(help="Which member of an ensemble.")] = 0,
    model: Annotated[str | None, typer.Option(help="Where the base model is now, if it moved.")] = None,
) -> None:
    """Write a run's mean for tools that do not know kilobayes."""
    from kilobayes.commands import runs

    runs.export(run, to, out, member, model)


@app.command("list")
def list_(
    model: Annotated[str | None, typer.Option(help="Also the bytes of each adapter on this model.")] = None,
    target_modules: Annotated[str | None, typer.Option(help="Modules to adapt, separated by commas.")] = None,
    json_: Json = False,
) -> None:
    """Every adapter and posterior with its options, defaults, paper and bytes."""
    from kilobayes.commands import inspect as run

    run.list_methods(model, target_modules, as_json=json_)


@app.command()
def env(json_: Json = False) -> None:
    """Versions and hardware, for a bug report."""
    from kilobayes.commands import inspect as run

    run.env(as_json=json_)


def _version(value: bool) -> None:
    if value:
        from kilobayes import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Fine-tune language models with adapters of kilobytes that carry a Bayesian posterior."""


def main() -> None:
    """The console script. Exit codes: 0 good, 2 bad input, 3 an extra is missing, 130 stopped with a checkpoint."""
    try:
        app(standalone_mode=True)
    except KilobayesError as error:
        if "--json" in sys.argv:
            sys.stdout.write(json.dumps({"error": error.wrong, "found": error.found, "remedy": error.remedy}) + "\n")
        lines = [f"error: {error.wrong}", error.found and f"found: {error.found}", error.remedy and f"try:   {error.remedy}"]
        sys.stderr.write("\n".join(line for line in lines if line) + "\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("stopped; what was done is kept. Add --resume to go on.\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
