"""``edit``: new facts for a language model, each by a small adapter, and their undoing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from kilobayes.commands.flags import Device, Json
from kilobayes.errors import KilobayesError


def edit(
    model: Annotated[
        str | None, typer.Argument(help="Base model: folder or hub id; or, with --undo, a folder of edits.")
    ] = None,
    facts: Annotated[
        Path | None, typer.Option(help="JSONL, CSV, ... with prompt and target_new, as EasyEdit's files.")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Default: RoseLoRA with the settings of its published code.")
    ] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="Modules separated by commas, or all-linear; default the model's own.")
    ] = None,
    sequential: Annotated[
        bool, typer.Option("--sequential/--single", help="One after the other, or each alone.")
    ] = True,
    steps: Annotated[int, typer.Option(help="At most so many of each edit.")] = 25,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 5e-4,
    enough: Annotated[float, typer.Option(help="Stop at a loss below so many nats per token.")] = 0.1,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many facts alone.")] = None,
    new_tokens: Annotated[int, typer.Option(min=0, help="Length of the texts for fluency; 0: none.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the adapter's start and noise.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the edits.")] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Take the last edits of a folder back.")] = False,
    last: Annotated[int, typer.Option(min=1, help="How many --undo takes back.")] = 1,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Of the base: float32, bfloat16 or float16.")] = "float32",
    json_: Json = False,
) -> None:
    """Teach a language model new facts, score them, and take them back."""
    if model is None:
        raise KilobayesError(
            "a model is missing" if not undo else "a folder of edits is missing",
            remedy="as in kilobayes edit MODEL --facts facts.jsonl --out runs/edits",
        )
    from kilobayes.commands import console

    if undo:
        if facts is not None or out is not None:
            raise KilobayesError(
                "--undo takes a folder of edits alone", remedy=f"kilobayes edit --undo {model}"
            )
        from kilobayes.workflows.edit_files import undo as take_back

        card = take_back(Path(model), last)
        console.say(f"{last} undone, {len(card['edits'])} left: {model}")
        if json_:
            console.result({"run": model, "undone": last, "edits": len(card["edits"])})
        return
    if facts is None:
        raise KilobayesError("there are no facts to edit", remedy="as in --facts facts.jsonl")
    place = out or Path("runs") / f"edits-{facts.name.partition('.')[0]}"
    from kilobayes.commands.runs import check_writable
    from kilobayes.workflows.edit import PUBLISHED, Editing
    from kilobayes.workflows.edit_files import CARD, shown
    from kilobayes.workflows.edit_run import run

    settings = Editing(steps=steps, lr=lr, enough=enough, seed=seed)
    check_writable(place / CARD)
    means = run(
        model, facts, place, settings,
        adapter=adapter or PUBLISHED, targets=target_modules, sequential=sequential, limit=limit,
        tokens=new_tokens, device=device, dtype=dtype, watch=_progress(console.say),
    )  # fmt: skip
    console.say(f"{means['edits']} edits, {means['mode']}: share with teacher forcing, in free generation")
    for name in ("success", "generality", "portability", "locality", "kept"):
        console.say(f"  {name:12} {shown(means[f'{name}_teacher']):>6} {shown(means[f'{name}_free']):>6}")
    console.say(
        f"  {'fluency':12} {shown(means['fluency'], 0):>6}, before {shown(means['fluency_before'], 0)}"
    )
    console.say(f"{place}; kilobayes edit --undo {place} takes the last one back")
    if json_:
        console.result({"run": str(place)} | means)


def _progress(say: Any, seconds: float = 15.0) -> Any:
    """Says how many edits are done, now and then."""
    last = time.monotonic()

    def watch(done: int) -> None:
        nonlocal last
        if time.monotonic() - last > seconds:
            last = time.monotonic()
            say(f"{done} edits made")

    return watch
