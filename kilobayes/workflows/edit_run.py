"""``kilobayes edit``: from a file of facts to a folder with the edits, their scores and what undoes them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kilobayes import host, tree
from kilobayes.errors import KilobayesError
from kilobayes.files import write_json, write_lines, write_text_atomically
from kilobayes.metrics import editing
from kilobayes.models import Base, fingerprint, load_causal
from kilobayes.tasks.edits import Fact, read_facts
from kilobayes.types import Params
from kilobayes.workflows import edit_files
from kilobayes.workflows.attach import device_of
from kilobayes.workflows.edit import (
    PUBLISHED,
    Edited,
    Editing,
    begin,
    edit_each,
    edit_in_turn,
    host_on,
    joined,
)
from kilobayes.workflows.edit_scores import Questions, ask, record, stop_ids


@dataclass(frozen=True, eq=False)
class Outcome:
    """Edits and their scores.

    Attributes:
        theta: a state for each edit ``(n, ...)``: of single edits its own, of sequential ones that after it.
        records: scores of each fact, ``then_teacher`` and ``then_free`` being a sequential edit's success
            right after it was made.
        means: over facts.
    """

    theta: Params
    records: list[dict[str, Any]]
    means: dict[str, Any]


def edit_facts(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Fact],
    settings: Editing,
    *,
    sequential: bool = True,
    longest: int | None = None,
    tokens: int = 100,
    watch: Callable[[int], None] | None = None,
) -> Outcome:
    """Edit a hosted model and score what came of it; the model's own parameters stay as they are.

    Args:
        sequential: one after the other; else each alone.
        longest: tokens that the model takes.
        tokens: length of the texts that fluency is measured on; 0 measures none.
        watch: called now and then with the number of edits done.

    Raises:
        KilobayesError: a prompt that does not fit, or an answer that the tokenizer does not know.
    """
    questions = []
    for number, fact in enumerate(facts, 1):
        try:
            questions.append(Questions.of(tokenizer, fact, longest))
        except KilobayesError as error:
            raise KilobayesError(f"edit {number}: {error.wrong}", error.found, error.remedy) from None
    stop, pad = stop_ids(model, tokenizer), tokenizer.pad_token_id or 0
    before = ask(model, tokenizer, None, questions, stop, tokens)
    start, own = begin(model, [settings.seed]), [q.own for q in questions]
    if sequential:
        states: list[Edited] = edit_in_turn(model, start, [own], settings, pad, _first(watch))
        edited = joined(states)
        after = ask(model, tokenizer, tree.member(edited.theta, -1), questions, stop, tokens)
    else:
        edited = edit_each(model, start, own, settings, pad, _first(watch))
        after = ask(model, tokenizer, edited.theta, questions, stop, tokens)
    records: list[dict[str, Any]] = [record(b, a) for b, a in zip(before, after)]
    if sequential:  # state s answers edit s's own prompt
        alone = [
            Questions(q.own, {name: [] for name in q.groups} | {"success": q.groups["success"]})
            for q in questions
        ]
        for row, told in zip(records, ask(model, tokenizer, edited.theta, alone, stop, 0)):
            then = editing.achieved("success", told.groups["success"])
            row |= {f"then_{way}": then[f"success_{way}"] for way in ("teacher", "free")}
    means: dict[str, Any] = editing.summarise(records)
    for way in ("teacher", "free"):
        means[f"then_{way}"] = editing.mean([row.get(f"then_{way}") for row in records])
    for row, taken, loss, told in zip(records, edited.steps.tolist(), edited.losses.tolist(), after):
        row |= {"steps": taken, "loss": loss if math.isfinite(loss) else None}
        row["text"] = told.groups["success"][0].text.strip()
    means["steps"] = editing.mean([row["steps"] for row in records])
    means["diverged"] = sum(row["loss"] is None for row in records)
    return Outcome(edited.theta, records, means)


def _first(watch: Callable[[int], None] | None) -> Callable[[int, Any], None] | None:
    return None if watch is None else lambda done, _: watch(done)


def run(
    name: str,
    source: str | Path,
    out: Path,
    settings: Editing,
    *,
    adapter: str = PUBLISHED,
    targets: str | None = None,
    sequential: bool = True,
    limit: int | None = None,
    tokens: int = 100,
    device: str = "auto",
    dtype: str = "float32",
    watch: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Edit a model by the facts of a file and write the folder; returns what ``metrics.json`` holds.

    Raises:
        KilobayesError: the folder holds edits already; facts or model cannot be read.
    """
    from kilobayes.workflows.evaluate import command, versions

    if (out / edit_files.CARD).exists():
        raise KilobayesError(f"{out} holds edits already", remedy="name another folder with --out")
    facts = read_facts(source, limit)
    base: Base = load_causal(name, dtype=dtype, device=device_of(device))
    mark = fingerprint(base.model)
    model = host_on(base, adapter, targets, settings.seed)
    began = time.monotonic()
    found = edit_facts(
        model, base.tokenizer, facts, settings,
        sequential=sequential, longest=base.longest, tokens=tokens, watch=watch,
    )  # fmt: skip
    card: dict[str, Any] = {
        "mode": "sequential" if sequential else "single", "base": name, "fingerprint": mark, "dtype": dtype,
        "adapter": repr(host.method(model)), "steps": settings.steps, "lr": settings.lr,
        "enough": settings.enough, "seed": settings.seed, "command": command(), "versions": versions(),
        "edits": [{"prompt": f.prompt, "target": f.target, "subject": f.subject} for f in facts],
    }  # fmt: skip
    sizes = edit_files.save(out, model, found.theta, card)
    means = {"mode": card["mode"], "edits": len(facts), "seconds": time.monotonic() - began}
    means |= found.means | {"bytes_per_state": sizes["adapter"] / len(facts)}
    write_json(out / edit_files.MEANS, means)
    said = ({"prompt": f.prompt, "target": f.target} | row for f, row in zip(facts, found.records))
    write_lines(out / edit_files.SCORES, said)
    write_text_atomically(out / "README.md", edit_files.readme(card, means))
    return means
