"""``generate``: texts that go on from prompts, and how sure the model is of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kilobayes.commands.flags import Device, Model, Samples
from kilobayes.errors import KilobayesError, nearest

KEYS = ("prompt", "messages", "text")


def generate(
    run: Annotated[
        str, typer.Argument(help="Folder of a run or of a PEFT adapter, or a base model's folder or hub id.")
    ],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    input: Annotated[
        str | None,
        typer.Option(help="Prompts: JSONL with a prompt or messages in each line; - reads standard input."),
    ] = None,
    output: Annotated[str, typer.Option(help="Where to write JSONL; - is standard output.")] = "-",
    max_new_tokens: Annotated[int, typer.Option(help="Longest text in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many of the most probable tokens; 0: all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the most probable tokens that reach this probability.")
    ] = 1.0,
    samples: Samples = None,
    completions: Annotated[int, typer.Option(help="Texts of each prompt, and how far they agree.")] = 1,
    stop: Annotated[
        list[str] | None, typer.Option(help="A string that ends a text; may be given several times.")
    ] = None,
    stop_entropy: Annotated[
        float | None, typer.Option(help="End a text where the entropy is above so many nats.")
    ] = None,
    stop_information: Annotated[
        float | None, typer.Option(help="End a text where the mutual information is above so many nats.")
    ] = None,
    alternatives: Annotated[int, typer.Option(help="Tokens to report at each position, in JSON.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts written at once.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the choice of tokens.")] = 0,
    model: Model = None,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option(help="Of the base, where a run does not say: float32, bfloat16 or float16.")
    ] = "float32",
    json_: Annotated[bool, typer.Option("--json", help="A JSON object for each prompt, not text.")] = False,
) -> None:
    """Continue texts; probabilities are averaged over the posterior at every token."""
    from kilobayes.commands import console
    from kilobayes.commands.runs import check_writable

    if output != "-":
        check_writable(Path(output))
    prompts = _prompts(prompt or [], input)
    from kilobayes.files import write_lines
    from kilobayes.language import LanguageModel
    from kilobayes.lm.sampling import Sampling

    sampling = Sampling(
        max_new_tokens, temperature, top_k, top_p, stop_entropy, stop_information, alternatives
    )
    found = LanguageModel.load(run, model=model, device=device, dtype=dtype)
    replies = found.generate(
        prompts, sampling,
        completions=completions, samples=samples, stop=stop or [], batch_size=batch_size, seed=seed,
    )  # fmt: skip
    if output != "-":
        write_lines(Path(output), (reply.record() for reply in replies))
        console.say(f"{len(replies)} prompts: {output}")
        return
    for reply in replies:
        if json_:
            console.result(reply.record())
            continue
        for each in reply.completions:
            sys.stdout.write(each.text.lstrip(" ") + "\n")
            sys.stdout.flush()
            console.say(_summary(each))
        if reply.agreement is not None:
            agree = reply.agreement
            console.say(
                f"{len(set(agree.clusters))} different answers in {completions}; {agree.share:.0%} agree, "
                f"entropy {agree.entropy:.2f} nats; the best is number {agree.best + 1}"
            )


def _summary(completion: Any) -> str:
    """How sure the model was, for a person."""
    written = completion.generated
    words = {"stop": "it ended", "length": "cut at its longest", "uncertain": "stopped in doubt"}
    end = words[written.finish]
    if written.doubt is not None:
        end += f" (entropy {written.doubt[0]:.2f}, mutual information {written.doubt[1]:.3f} nats)"
    if not written.tokens:
        return f"  no tokens; {end}"
    return (
        f"  {len(written.tokens)} tokens, perplexity {written.perplexity:.2f}, mean entropy "
        f"{written.mean_entropy:.2f} nats, mutual information {written.mean_information:.3f} nats; {end}"
    )


def _prompts(given: list[str], source: str | None) -> list[Any]:
    """Those on the command line, or of a file, or of standard input: JSON lines, or all of it one text.

    Raises:
        KilobayesError: none of them or several, a line without a prompt, a file that cannot be read.
    """
    if bool(given) == bool(source):
        if given or sys.stdin.isatty():
            raise KilobayesError(
                "prompts come from --prompt or from --input" + (", not both" if given else ""),
                remedy='as in --prompt "Once upon a time"',
            )
        source = "-"
    if given:
        return list(given)
    assert source is not None
    where = "standard input" if source == "-" else source
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise KilobayesError(f"{where} cannot be read", str(error), "give a JSONL file in UTF-8") from None
    if not text.strip():
        raise KilobayesError(f"{where} is empty", remedy='give lines such as {"prompt": "..."}')
    if source == "-" and not text.lstrip().startswith("{"):
        return [text.rstrip("\n")]
    return [
        _prompt(line, f"line {number} of {where}")
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip()
    ]


def _prompt(line: str, where: str) -> Any:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise KilobayesError(f"{where} is no JSON", str(error)[:200], 'as in {"prompt": "..."}') from None
    if isinstance(row, str):
        return row
    key = next((k for k in KEYS if isinstance(row, dict) and k in row), None)
    if key is None:
        names = list(row) if isinstance(row, dict) else []
        guess = next((f"did you mean prompt in place of {n}?" for n in names if nearest(n, KEYS)), "")
        found = f"found {', '.join(names)}" if names else f"found {line!r:.60}"
        raise KilobayesError(f"{where} has no prompt", found, guess or 'as in {"prompt": "..."}')
    if not isinstance(row[key], str if key != "messages" else list):
        kind = "a list of messages" if key == "messages" else "text"
        raise KilobayesError(f"{where}: {key} is not {kind}", f"found {row[key]!r:.60}")
    return row[key]
