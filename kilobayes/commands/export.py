"""``export``: a run's mean or draws for other tools, or its mean in the smallest file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kilobayes.commands.flags import Json, Model, Run
from kilobayes.errors import KilobayesError, nearest

KINDS = {
    "lora": "plain PEFT LoRA of the mean",
    "merged": "the model with the mean merged",
    "compact": "the smallest file of the mean, for kilobayes",
    "samples": "draws as plain PEFT LoRA, for kilobayes proxy",
}


def export(
    run: Run,
    to: Annotated[str, typer.Option(help="; ".join(f"{k}: {v}" for k, v in KINDS.items()) + ".")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    member: Annotated[int, typer.Option(help="Which member of an ensemble.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="Of a compact file: float32, float16, bfloat16 or int8.")
    ] = "float32",
    count: Annotated[
        int | None, typer.Option(min=1, help="How many samples; default the run's own number.")
    ] = None,
    model: Model = None,
    json_: Json = False,
) -> None:
    """Write a run's mean or draws for tools that do not know kilobayes, or as small as it gets."""
    from kilobayes.commands import console
    from kilobayes.commands.runs import check_writable

    if to not in KINDS:
        guess = nearest(to, KINDS)
        remedy = f"did you mean --to {guess}?" if guess else "as in --to lora"
        raise KilobayesError(f"cannot export to {to!r}", f"known: {', '.join(KINDS)}", remedy)
    if dtype != "float32" and to != "compact":
        raise KilobayesError("--dtype is for compact files", f"found --to {to}", "take --to compact")
    if count is not None and to != "samples":
        raise KilobayesError("--count is for samples", f"found --to {to}", "take --to samples")
    if to == "samples":
        check_writable(out / "manifest.json")
        _samples(run, out, count, model, json_)
        return
    check_writable(out / "adapter_config.json")
    from kilobayes import host, parametrise, tree
    from kilobayes.host.compact import DTYPES, export_compact
    from kilobayes.workflows.finetune import load

    if dtype not in DTYPES:
        raise KilobayesError(f"--dtype {dtype} is not known", f"known: {', '.join(DTYPES)}")
    fitted = load(run, model=model, device="cpu")
    mean = fitted.posterior.mean(fitted.state)
    if not 0 <= member < tree.size(mean):
        raise KilobayesError(
            f"there is no member {member}", f"the run has {tree.size(mean)}", "as in --member 0"
        )
    mean = parametrise.restrict(host.method(fitted.model), mean, mean)
    host.write(fitted.model, tree.member(mean, member))
    facts: dict[str, Any] = {}
    if to == "compact":
        facts = export_compact(fitted.model, out, dtype=dtype)
        console.say(
            f"{facts['file']:,} bytes: adapter {facts['adapter']:,}, head {facts['head']:,}, check values "
            f"{facts['check']:,}, names the rest; as {dtype} the updates are off by {facts['error']:.2g}"
        )
    elif to == "lora":
        host.export_lora(fitted.model, out)
    else:
        host.export_merged(fitted.model, out)
        # transformers would quietly make an empty tokenizer where there is none
        fitted.task.tokenizer.save_pretrained(out)  # type: ignore[attr-defined]
    console.say(f"{to}: {out} (the mean of the weights, which is not the mean of the predictions)")
    if json_:
        console.result({"run": str(run), "to": to, "out": str(out)} | facts)


def _samples(run: Path, out: Path, count: int | None, model: str | None, as_json: bool) -> None:
    from kilobayes.commands import console
    from kilobayes.workflows.samples import export_samples

    found = export_samples(run, out, count, model=model)
    names = [sample["name"] for sample in found["samples"]]
    console.say(f"samples: {len(names)} adapters in {out}, {names[0]} to {names[-1]}")
    if found["transformed"]:
        console.say(
            "note: this posterior changes scores after the model, as a temperature does; an adapter cannot "
            "hold that, so other servers' probabilities are those before it"
        )
    if as_json:
        console.result({"run": str(run), "to": "samples", "out": str(out), "samples": names})
