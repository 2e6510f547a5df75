"""``arithmetic``: sums of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kilobayes.commands.flags import Device, Json, Model
from kilobayes.errors import KilobayesError


def arithmetic(
    terms: Annotated[str, typer.Argument(help='As "0.5*runs/a + 0.5*runs/b - 0.2*runs/c".')],
    out: Annotated[Path, typer.Option(help="Folder of the new run.")],
    how: Annotated[
        str, typer.Option(help="Sum updates, leaves, or auto: leaves where it is the same.")
    ] = "auto",
    rank: Annotated[
        int | None, typer.Option(min=1, help="Of summed updates; default the sum of the ranks: exact.")
    ] = None,
    head: Annotated[
        str, typer.Option(help="The run whose head is taken; default the mean of all, weighted.")
    ] = "",
    posterior: Annotated[
        str, typer.Option(help="point: of the means; samples: of draws; auto: what the runs have.")
    ] = "auto",
    samples: Annotated[int | None, typer.Option(min=2, help="Draws; default the run's own.")] = None,
    model: Model = None,
    device: Device = "auto",
    json_: Json = False,
) -> None:
    """Add, average, interpolate and subtract runs: one adapter from several."""
    from kilobayes.workflows.terms import parse

    found = parse(terms)
    if (out / "posterior.json").exists():
        raise KilobayesError(f"{out} holds a run already", remedy="name another folder with --out")
    from kilobayes.commands import console
    from kilobayes.commands.runs import check_writable

    check_writable(out / "posterior.json")
    from kilobayes import spec
    from kilobayes.workflows.arithmetic import combine, write

    done = combine(
        found, how=how, rank=rank, head=head, posterior=posterior, samples=samples, model=model, device=device
    )
    sizes = write(done, out, found, head)
    size = sizes["checkpoint"] + sizes["posterior"]
    shown = f"{spec.format(spec.adapter(done.card.adapter))}, {spec.format(done.posterior)}"
    console.say(f"{shown}: {console.human(size)}, sum of {done.how}, {done.lost:.2%} of its norm lost")
    for note in done.notes:
        console.say(f"note: {note}")
    console.say(f"next:   kilobayes {'generate' if done.card.task == 'lm' else 'evaluate'} {out} ...")
    if json_:
        told = {"run": str(out), "how": done.how, "lost": done.lost, "bytes": size}
        console.result(told | {"adapter": done.card.adapter, "posterior": done.card.posterior})
