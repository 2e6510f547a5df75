"""``discriminator`` and ``transfer``: a run on another base, without the task's data."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from kilobayes.commands.flags import Device, Json, Model, Run
from kilobayes.options import Options

Unlabelled = Annotated[str | None, typer.Option(help="Texts without labels to make inputs from.")]
Text = Annotated[str | None, typer.Option(help="Column of the text in --unlabelled.")]
Pair = Annotated[str | None, typer.Option(help="Column of the second text of a pair there.")]
Writer = Annotated[str, typer.Option(help="Language model that makes inputs: a base, or a run.")]
How = Annotated[
    str, typer.Option(help="continue, retrieve, perturb or given; auto: the first there is something for.")
]
Form = Annotated[str, typer.Option(help="Of a list that is continued: numbered, plain or opening; or auto.")]
Near = Annotated[str, typer.Option(help="Nearness to the seeds, by words or by embeddings.")]
Words = Annotated[int, typer.Option(min=1, help="Words of an input that is the beginning of a text.")]
MakingSeed = Annotated[int, typer.Option(help="Seed of everything random.")]
Lr = Annotated[float, typer.Option(help="Peak learning rate.")]
Epochs = Annotated[int, typer.Option(help="Passes over the rows.")]
Batch = Annotated[int, typer.Option(help="Rows of an optimiser step.")]
Modules = Annotated[str | None, typer.Option(help='Modules to adapt, separated by commas, or "all-linear".')]


def discriminator(
    run: Run,
    data: Annotated[str, typer.Option(help="What the run was trained on; not needed again.")],
    out: Annotated[Path | None, typer.Option(help="Folder; default RUN/discriminator.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of the data; default train.")] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Examples to start from later; default a few rows of the data.")
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="How many, if they are drawn from the data.")] = 5,
    unlabelled: Unlabelled = None,
    generator: Writer = "",
    how: How = "auto",
    form: Form = "auto",
    near: Near = "words",
    words: Words = 24,
    limit: Annotated[int, typer.Option(min=10, help="At most so many real rows.")] = 1000,
    text_column: Text = None,
    pair_column: Pair = None,
    adapter: Annotated[str, typer.Option(help="Adapter of the discriminator.")] = "LoRA(r=8)",
    lr: Lr = Options.lr,
    epochs: Epochs = Options.epochs,
    batch_size: Batch = Options.batch_size,
    model: Model = None,
    device: Device = "auto",
    seed: MakingSeed = 0,
    json_: Json = False,
) -> None:
    """Train what tells a run's real inputs from made-up ones, so that the run can be transferred later."""
    from kilobayes.commands import console
    from kilobayes.transferring import train_discriminator

    columns = {"text_column": text_column, "pair_column": pair_column}
    with console.bar("training") as watch:
        done = train_discriminator(
            run, data, out or "", split=split, seeds=seeds, examples=examples, unlabelled=unlabelled,
            generator=generator, how=how, form=form, near=near, words=words, limit=limit, columns=columns,
            model=model, adapter=adapter, lr=lr, epochs=epochs, batch_size=batch_size, device=device,
            seed=seed, watch=watch, say=console.say,
        )  # fmt: skip
    held, copies = done.report["held_out"], done.report["duplicates_of_real"]
    console.say(
        f"of rows held out it lets {held['accepts_real']:.0%} of the real pass and "
        f"{held['accepts_synthetic']:.0%} of the made-up; AUROC {held['auroc']:.3f}"
    )
    if held["accepts_real"] < 0.5:
        console.say("note: it refuses most real rows; more --epochs, or a lower --threshold later, may help")
    console.say(f"made-up rows that are rows of the data: {copies['exact']} exactly, {copies['near']} nearly")
    console.say(f"seeds:  {done.folder / 'seeds.jsonl'}: real rows; look at them before they are used")
    console.say(
        f"next:   kilobayes transfer {shlex.quote(str(run))} --to MODEL --discriminator "
        f"{shlex.quote(str(done.folder))} --out ..."
    )
    if json_:
        console.result({"discriminator": str(done.folder)} | done.report)


def transfer(
    run: Run,
    to: Annotated[str, typer.Option(help="Target base: a folder, a hub id, or minilm.")],
    out: Annotated[Path, typer.Option(help="Folder of the new run.")],
    adapter: Annotated[str | None, typer.Option(help="Of the new run; default the source's.")] = None,
    posterior: Annotated[str | None, typer.Option(help="Of the new run; default the source's.")] = None,
    discriminator: Annotated[
        str, typer.Option(help="Filter: a folder, or none; default RUN/discriminator if it is there.")
    ] = "",
    seeds: Annotated[
        str | None, typer.Option(help="A few real examples; default those that the discriminator keeps.")
    ] = None,
    unlabelled: Unlabelled = None,
    generator: Writer = "",
    how: How = "auto",
    form: Form = "auto",
    near: Near = "words",
    words: Words = 24,
    inputs: Annotated[int, typer.Option(help="Inputs to learn from, those held out included.")] = 250,
    max_tries: Annotated[int, typer.Option(help="Proposals at most; 0 for 20 times the inputs.")] = 0,
    threshold: Annotated[float, typer.Option(help="Least probability of a kept input to be real.")] = 0.5,
    objective: Annotated[
        str,
        typer.Option(help="probabilities or text of classes, text or logits of language models; or auto."),
    ] = "auto",
    completions: Annotated[int, typer.Option(help="Texts of each input, of a language model.")] = 1,
    calibration: Annotated[str, typer.Option(help="Share, or number, of inputs held out.")] = "0.2",
    audit: Annotated[
        str | None, typer.Option(help="Real rows to compare made-up inputs with, for the report alone.")
    ] = None,
    text_column: Text = None,
    pair_column: Pair = None,
    target_modules: Modules = None,
    lr: Lr = Options.lr,
    epochs: Epochs = Options.epochs,
    batch_size: Batch = Options.batch_size,
    max_length: Annotated[int | None, typer.Option(help="Longest row; default the source's.")] = None,
    model: Model = None,
    device: Device = "auto",
    seed: MakingSeed = 0,
    resume: Annotated[bool, typer.Option(help="Go on with a transfer that was killed.")] = False,
    json_: Json = False,
) -> None:
    """Move a run to another base or adapter without its data: inputs are made up, the run labels them."""
    from kilobayes.commands import console
    from kilobayes.transferring import planned
    from kilobayes.workflows.transfer import transfer as work

    given: dict[str, Any] = {
        "model": to, "out": str(out), "adapter": adapter, "posterior": posterior, "inputs": inputs,
        "discriminator": discriminator, "max_tries": max_tries, "threshold": threshold,
        "objective": objective, "completions": completions, "generator": generator, "how": how,
        "form": form, "near": near, "words": words, "calibration": calibration, "lr": lr, "epochs": epochs,
        "batch_size": batch_size, "max_length": max_length, "target_modules": target_modules,
        "device": device, "seed": seed, "resume": resume, "source_model": model,
    }  # fmt: skip
    plan, options = planned(run, given)
    columns = {"text_column": text_column, "pair_column": pair_column}
    with console.bar("training") as watch:
        done = work(
            plan, options, seeds=seeds, unlabelled=unlabelled, audit=audit, columns=columns, watch=watch,
            say=console.say,
        )  # fmt: skip
    report = done.report
    passed = "" if report["acceptance"] is None else f", {report['acceptance']:.0%} passed"
    console.say(f"inputs: {report['inputs']} from {report['tries']} proposals{passed}")
    if "agreement" in report:
        console.say(
            f"says what the source says: {report['agreement']['same']:.1%} ({report['agreement_on']})"
        )
    stored = done.sizes["checkpoint"] + done.sizes["posterior"]
    console.say(f"run:    {done.folder}, {console.human(stored)}; its report is transfer.json")
    verb = "generate" if done.fitted.card.task == "lm" else "evaluate"
    console.say(f"next:   kilobayes {verb} {shlex.quote(str(done.folder))} ...")
    if json_:
        console.result({"run": str(done.folder), "bytes": stored} | report)
