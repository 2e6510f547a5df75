"""``calibrate``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from kilobayes.commands.flags import Data, Device, Json, Label, Limit, Model, Pair, Samples, Text
from kilobayes.errors import KilobayesError


def calibrate(
    adapter: Annotated[Path, typer.Argument(help="Folder of a PEFT LoRA, or of a run.")],
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder of the calibrated run.")],
    split: Annotated[
        str | None, typer.Option(help="Split of the data; default validation, then test.")
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(help="Rows it was trained on, for posteriors that need them; or a split of --data."),
    ] = None,
    test: Annotated[
        str | None, typer.Option(help="Rows to evaluate on, before and after; or a split of --data.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="classify, or lm for texts; default what the adapter's configuration says."),
    ] = None,
    posterior: Annotated[
        str | None,
        typer.Option(
            help="What to fit, as Temperature(Laplace()) or Temperature(TFB()); default a temperature "
            "around what a run has."
        ),
    ] = None,
    classes: Annotated[
        str | None, typer.Option(help="Class names of a LoRA in index order, separated by commas.")
    ] = None,
    text_column: Text = None,
    pair_column: Pair = None,
    label_column: Label = None,
    limit: Limit = None,
    max_length: Annotated[int | None, typer.Option(min=4, help="Longest row of a LoRA in tokens.")] = None,
    samples: Samples = None,
    model: Model = None,
    dtype: Annotated[str, typer.Option(help="Precision of a LoRA's base.")] = "float32",
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Seed of a LoRA's draws.")] = 0,
    json_: Json = False,
) -> None:
    """Fit a posterior to a finished LoRA, or another to a run, without training it again."""
    from kilobayes.commands import console
    from kilobayes.workflows import calibration_run as work
    from kilobayes.workflows.calibrate import calibrate as fit
    from kilobayes.workflows.calibration_rows import Sources
    from kilobayes.workflows.evaluate import headline
    from kilobayes.workflows.frame import own_warnings
    from kilobayes.workflows.lora_folder import TASK_TYPES, task_of

    work.check_free(out)
    task = task or task_of(adapter)
    if task == "lm":
        from kilobayes.commands import language

        columns = {"text_column": text_column, "label_column": label_column}
        texts = Sources(data, split, train, test, columns, limit)
        given = {"model": model, "max_length": max_length, "samples": samples, "dtype": dtype}
        language.calibrate(
            adapter, texts, posterior, out, given | {"device": device, "seed": seed}, as_json=json_
        )
        return
    if task not in (*TASK_TYPES, "choice"):
        raise KilobayesError(f"--task {task} is not known", f"known: {', '.join(TASK_TYPES)}")
    named = None if classes is None else [name.strip() for name in classes.split(",")]
    columns = {"text_column": text_column, "pair_column": pair_column, "label_column": label_column}
    rows = Sources(data, split, train, test, columns, limit)
    with own_warnings() as warned:
        done = fit(
            adapter, rows, posterior, classes=named, model=model, max_length=max_length, samples=samples,
            dtype=dtype, device=device, seed=seed,
        )  # fmt: skip
    done.notes.extend(dict.fromkeys(warned))
    for line in done.notes:
        console.say(f"note: {line}")
    evaluations, summaries = work.write(done, out, adapter, rows)
    if evaluations:
        names = [evaluation.name for evaluation in evaluations]
        console.console.print(console.table(names, summaries, [e.cost for e in evaluations]))
        console.say(f"report: {out / 'report.html'}")
    else:
        console.say(f"next:   kilobayes evaluate {shlex.quote(str(out))} --data test.csv")
    console.say(f"run:    {out}")
    if json_:
        figures = [headline(e, s) for e, s in zip(evaluations, summaries, strict=True)]
        found: dict[str, Any] = {
            "run": str(out),
            "posterior": done.fitted.card.posterior,
            "notes": done.notes,
        }
        if figures:
            found |= {"before": figures[0], "after": figures[1]}
        console.result(found)
