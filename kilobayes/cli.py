"""The command line: one function per command; nothing heavy is imported before a command runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from kilobayes.commands import shell
from kilobayes.commands.arithmetic import arithmetic
from kilobayes.commands.calibrate import calibrate
from kilobayes.commands.collaborate import collaborate
from kilobayes.commands.edit import edit
from kilobayes.commands.export import export
from kilobayes.commands.federated import client, server
from kilobayes.commands.flags import (
    Coverage,
    Data,
    Device,
    HeldOut,
    Json,
    Label,
    Limit,
    Model,
    Ood,
    Pair,
    Run,
    Samples,
    Sets,
    Split,
    Text,
    from_options,
)
from kilobayes.commands.generate import generate
from kilobayes.commands.serve import proxy, serve
from kilobayes.commands.transfer import discriminator, transfer
from kilobayes.options import Options

app = typer.Typer(
    name="kilobayes",
    help="Fine-tune language models with adapters of kilobytes that carry a Bayesian posterior.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda word: word.replace("_", "-"),  # --batch_size is --batch-size
    },
)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the demonstration.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    quick: Annotated[bool, typer.Option(help="A third of the data and of the training.")] = False,
) -> None:
    """Fine-tune a real encoder on real text, with and without a posterior; offline, in minutes."""
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
    input: Annotated[
        str, typer.Option(help="Texts: JSONL(.gz), CSV, TSV or Parquet; - reads JSONL from standard input.")
    ],
    output: Annotated[
        str, typer.Option(help="Where to write, as JSONL or .csv; - is standard output.")
    ] = "-",
    text_column: Text = None,
    pair_column: Pair = None,
    samples: Samples = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a forward.")] = 32,
    coverage: Coverage = None,
    sets: Sets = "lac",
    max_error: Annotated[
        float | None, typer.Option(help="Accept so many rows that at most this share is wrong, as 0.05.")
    ] = None,
    held_out: HeldOut = None,
    model: Model = None,
    device: Device = "auto",
) -> None:
    """Label, probabilities, confidence, entropy and mutual information of every row, in order."""
    from kilobayes.commands import predict as command
    from kilobayes.commands.doubt import Doubt

    columns = {"text_column": text_column, "pair_column": pair_column}
    doubt = Doubt(coverage, sets, max_error, held_out)
    command.predict(run, input, output, columns, samples, batch_size, model, device, doubt)


@app.command()
def evaluate(
    run: Run,
    data: Data,
    split: Split = None,
    ood: Ood = None,
    text_column: Text = None,
    pair_column: Pair = None,
    label_column: Label = None,
    limit: Limit = None,
    samples: Samples = None,
    coverage: Coverage = None,
    sets: Sets = "lac",
    held_out: HeldOut = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for metrics.json, report.html and predictions.jsonl.")
    ] = None,
    model: Model = None,
    device: Device = "auto",
    json_: Json = False,
) -> None:
    """Accuracy, calibration and uncertainty of a run on labelled data."""
    from kilobayes.commands import runs
    from kilobayes.commands.doubt import Doubt

    columns = {"text_column": text_column, "pair_column": pair_column, "label_column": label_column}
    doubt = Doubt(coverage, sets, None, held_out)
    runs.evaluate(run, data, split, ood, columns, limit, samples, out, model, device, doubt, as_json=json_)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    data: Data,
    split: Split = None,
    ood: Ood = None,
    text_column: Text = None,
    pair_column: Pair = None,
    label_column: Label = None,
    limit: Limit = None,
    samples: Samples = None,
    out: Annotated[Path, typer.Option(help="Folder for the table and the report.")] = Path("runs/compare"),
    model: Model = None,
    device: Device = "auto",
    json_: Json = False,
) -> None:
    """Several runs on the same rows, in one table and report; seeds of one arm are pooled."""
    from kilobayes.commands import runs as command

    columns = {"text_column": text_column, "pair_column": pair_column, "label_column": label_column}
    command.compare(runs, data, split, ood, columns, limit, samples, out, model, device, as_json=json_)


app.command()(generate)
app.command()(export)


@app.command()
def thin(
    run: Run,
    bytes_: Annotated[str, typer.Option("--bytes", help="Budget of the posterior and its mean, as 400kB.")],
    out: Annotated[Path, typer.Option(help="Folder of the smaller run.")],
    how: Annotated[str, typer.Option(help="rank: of SWAG; samples: a few draws; or auto.")] = "auto",
    model: Model = None,
    json_: Json = False,
) -> None:
    """Make a run's posterior smaller: a lower rank, a few draws, or fewer members."""
    from kilobayes.commands import thin as command

    command.thin(run, bytes_, how, out, model, as_json=json_)


for _command in (
    arithmetic, discriminator, transfer, calibrate, collaborate, server, client, edit, serve, proxy,
):  # fmt: skip
    app.command()(_command)


@app.command("list")
def list_(
    model: Annotated[
        str | None, typer.Option("--sizes", "--model", help="Also the bytes of each adapter on this model.")
    ] = None,
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
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fine-tune language models with adapters of kilobytes that carry a Bayesian posterior."""


def run(arguments: list[str]) -> int:
    """A command line without the program's name; returns the exit code."""
    return shell.run(app, arguments)


def main() -> None:
    """The console script. Exit codes: 0 good, 2 bad input, 3 an extra is missing, 130 stopped by Ctrl-C."""
    shell.quiet()
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
