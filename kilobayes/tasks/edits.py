"""Facts to edit: prompts with new answers, and what else must follow, or must stay as it was.

Read from JSON lines, JSON, CSV, TSV or Parquet, in the flat form of EasyEdit's CounterFact and zsRE files,
or with KnowEdit's nested ``locality`` and ``portability``. A column may hold one text or a list of them; in
CSV a list is written as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kilobayes.errors import KilobayesError, nearest
from kilobayes.lm.prompts import encode
from kilobayes.tasks.table import read_file

TARGETS = ("target_new", "target", "attribute")
TRUTHS = ("ground_truth", "target_true")
REPHRASED = ("rephrase_prompt", "rephrase_prompts", "rephrase")
KNOWN = ("prompt", "subject", *TARGETS, *TRUTHS, *REPHRASED, "locality_prompt", "portability_prompt")


@dataclass(frozen=True)
class Probe:
    """A prompt that an edit is judged by.

    Attributes:
        answer: of a locality prompt the one that must stay, of any other the one that must come.
        kind: within locality or portability, such as ``Subject_Aliasing``; means are taken over kinds.
    """

    prompt: str
    answer: str
    kind: str = ""


@dataclass(frozen=True)
class Fact:
    """One edit: ``prompt`` shall be answered by ``target``.

    Attributes:
        truth: the answer before, "" where the file does not say.
        rephrased: the same question in other words, with the same new answer.
        locality: questions about other things, whose answers must stay.
        portability: questions whose answers follow from the edit.
    """

    prompt: str
    target: str
    subject: str = ""
    truth: str = ""
    rephrased: tuple[Probe, ...] = ()
    locality: tuple[Probe, ...] = ()
    portability: tuple[Probe, ...] = ()


@dataclass(frozen=True)
class Pair:
    """A prompt and its answer in tokens, special ones of the beginning included, and the answer's text."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    text: str


def read_facts(path: str | Path, limit: int | None = None) -> list[Fact]:
    """The facts of a file, in order.

    Columns: ``prompt``; ``target_new`` (or ``target``, or ``attribute``); where there are any, ``subject``,
    ``ground_truth``, ``rephrase_prompt``, ``locality_prompt`` with ``locality_ground_truth``,
    ``portability_prompt`` with ``portability_ground_truth``, names with a plural s too.

    Args:
        limit: at most so many, the first.

    Raises:
        KilobayesError: a column or a value is missing, with the row; prompts and answers differ in number.
    """
    table = read_file(Path(path))
    names = list(table.columns)
    target = next((name for name in TARGETS if name in names), None)
    if "prompt" not in names or target is None:
        missing = "prompt" if "prompt" not in names else "target_new"
        guess = nearest(missing, [n for n in names if n not in KNOWN])
        raise KilobayesError(
            f"{table.name} has no column {missing}", f"found {', '.join(names)}",
            f"rename {guess}?" if guess else 'as in {"prompt": "Mars is named for", "target_new": "Venus"}',
        )  # fmt: skip
    count = len(table) if limit is None else min(limit, len(table))
    rows = ({name: values[i] for name, values in table.columns.items()} for i in range(count))
    return [_fact(row, target, f"row {number} of {table.name}") for number, row in enumerate(rows, 1)]


def _fact(row: Mapping[str, Any], target: str, where: str) -> Fact:
    prompt, new = _one(row, ("prompt",), where), _one(row, (target,), where)
    for name, value in (("prompt", prompt), (target, new)):
        if not value.strip():
            raise KilobayesError(f"{where} has no {name}", f"found {row[name]!r:.60}")
    rephrased = [text for name in REPHRASED for text in _many(row.get(name), where)]
    return Fact(
        prompt,
        new,
        _one(row, ("subject",), where),
        _one(row, TRUTHS, where),
        tuple(Probe(text, new) for text in rephrased),
        tuple(_probes(row, "locality", where)),
        tuple(_probes(row, "portability", where)),
    )


def _probes(row: Mapping[str, Any], name: str, where: str) -> Iterator[Probe]:
    """Of ``name_prompt``, ``name_ground_truth``; of ``name``: {kind: [{prompt, ground_truth}, ...]}."""
    columns = (f"{name}_prompt", f"{name}_prompts")
    prompts = [text for column in columns for text in _many(row.get(column), where)]
    endings = ("ground_truth", "ground_truths", "answer", "answers")
    answers = [text for end in endings for text in _many(row.get(f"{name}_{end}"), where)]
    if len(prompts) != len(answers):
        raise KilobayesError(
            f"{where}: {len(prompts)} of {name}_prompt need as many answers",
            f"found {len(answers)} in {name}_ground_truth",
        )
    yield from (Probe(p, a) for p, a in zip(prompts, answers))
    nested = _parsed(row.get(name), where) or {}
    if not isinstance(nested, Mapping):
        raise KilobayesError(
            f"{where}: {name} is not an object of kinds", f"found {nested!r:.60}",
            f'as in {{"{name}": {{"kind": [{{"prompt": ..., "ground_truth": ...}}]}}}}',
        )  # fmt: skip
    for kind, items in nested.items():
        for item in [items] if isinstance(items, Mapping) else items or []:
            found = [_many(item.get(key), where) for key in ("prompt", "ground_truth")] if item else []
            if len(found) != 2 or not all(found):
                raise KilobayesError(f"{where}: {name}, {kind} lacks prompt or ground_truth", f"{item!r:.80}")
            yield Probe(found[0][0], found[1][0], str(kind))


def _parsed(value: Any, where: str) -> Any:
    """A value, or what its JSON holds if it is a text that is written as a list or an object."""
    if not isinstance(value, str) or not value.lstrip().startswith(('["', "[[", '{"')):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise KilobayesError(f"{where} holds a damaged list", str(error)[:100], f"{value[:60]}") from None


def _many(value: Any, where: str) -> list[str]:
    """Texts of a cell: none, one, or a list; of a list within the list, which holds aliases, the first."""
    value = _parsed(value, where)
    if value is None or value == "":
        return []
    found = value if isinstance(value, list) else [value]
    firsts = [item[0] if isinstance(item, list) and item else item for item in found]
    if not all(isinstance(item, str | int | float) for item in firsts):
        raise KilobayesError(f"{where} holds what is no text", f"found {value!r:.60}")
    return [str(item) for item in firsts]


def _one(row: Mapping[str, Any], names: tuple[str, ...], where: str) -> str:
    return next((found[0] for name in names if (found := _many(row.get(name), where))), "")


def encode_pair(tokenizer: Any, prompt: str, answer: str, longest: int | None = None) -> Pair:
    """Prompt and answer in tokens: the prompt as it would be read alone, then what the answer adds to it.

    A space stands between them, unless the prompt ends its line; wherever the tokenizer puts that space, it
    belongs to the answer, so that a model which reads the prompt alone can go on with it.

    Raises:
        KilobayesError: nothing to read, words the tokenizer does not know, or more tokens than fit.
    """
    shown = prompt.rstrip(" ")
    told = ("" if shown.endswith("\n") else " ") + answer.strip()
    start, whole = encode(tokenizer, shown)[1], encode(tokenizer, shown + told)[1]
    if whole[: len(start)] == start:
        own = whole[len(start) :]
    else:  # prompt and answer share a token: the answer is read by itself
        own = next(ids for ids in _alone(tokenizer, start, shown, told) if ids is not None)
    if not start or not own:
        raise KilobayesError(
            "a prompt or its answer has no tokens", f"found {shown!r:.60} and {answer!r:.60}"
        )
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in own:
        raise KilobayesError(
            f"the tokenizer does not know the answer {answer.strip()!r:.60}", "it holds unknown tokens"
        )
    if longest is not None and len(start) + len(own) > longest:
        raise KilobayesError(
            f"a prompt and its answer have {len(start) + len(own)} tokens", f"the model takes {longest}"
        )
    return Pair(tuple(start), tuple(own), answer.strip())


def _alone(tokenizer: Any, start: list[int], shown: str, told: str) -> Iterator[list[int] | None]:
    """Ways to read an answer by itself; the first after which the text is as it should be, else the last."""
    for text in (told, told.strip()):
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        back = tokenizer.decode([*start, *ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        yield ids if back.strip() == (shown + told).strip() or text == told.strip() else None
