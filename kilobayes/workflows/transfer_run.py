"""The folder of a transfer: its stages while it goes on, and the run that it becomes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kilobayes import __version__, spec
from kilobayes.card import Card
from kilobayes.distil import tokens
from kilobayes.distil.rows import Row
from kilobayes.distil.synthesis import Synthesis
from kilobayes.errors import KilobayesError
from kilobayes.files import digest, write_json, write_text_atomically
from kilobayes.language import LanguageModel
from kilobayes.options import Options
from kilobayes.run_yaml import read_yaml
from kilobayes.workflows import frame
from kilobayes.workflows.evaluate import command, versions
from kilobayes.workflows.language import FittedLanguage
from kilobayes.workflows.language import load as load_language

SYNTHESIS, INPUTS, REPORT = "synthesis.json", "inputs.jsonl", "transfer.json"


@dataclass(frozen=True, eq=False)
class Transferred:
    """A transferred run that is on disk.

    Attributes:
        fitted: the student, a :class:`~kilobayes.workflows.finetune.Fitted` or a
            :class:`~kilobayes.workflows.language.FittedLanguage`.
        report: what ``transfer.json`` reports.
    """

    folder: Path
    fitted: Any
    report: dict[str, Any]
    sizes: dict[str, int]


def of_source(options: Options, source: Path, card: Card) -> Options:
    """The student's options with what it takes over from the source: the task and the names of columns."""
    there = read_yaml(source / "run.yaml") if (source / "run.yaml").exists() else {}
    columns: dict[str, Any] = {k: there.get(k) for k in ("text_column", "pair_column", "label_column")}
    out = Path(options.out) if options.out else source.with_name(f"{source.name}-transferred")
    return replace(options, task=card.task, data=str(out / INPUTS), out=str(out), **columns)


def settings(
    folder: Path, plan: Any, options: Options, seeds: Sequence[Row], pool: Sequence[Row]
) -> dict[str, Any]:
    """What makes it the same transfer, written down, or compared with what a killed one wrote.

    Raises:
        KilobayesError: it was killed with other settings.
    """
    rows = {"seeds": _digest(seeds), "unlabelled": _digest(pool)}
    found = json.loads(json.dumps(asdict(plan) | {"target": options.model, "rows": rows}))
    path = folder / REPORT
    if options.resume and path.exists():
        theirs = json.loads(path.read_text(encoding="utf-8")).get("settings", {})
        odd = [k for k in found if found[k] != theirs.get(k)]
        if odd:
            raise KilobayesError(
                f"{folder} holds a transfer of other settings",
                "; ".join(f"{k}: {theirs.get(k)} there, {found[k]} here" for k in odd[:3]),
                "resume with the same settings, or name another --out",
            )
    for name in (SYNTHESIS, INPUTS):  # of a transfer that was given up
        if not options.resume:
            (folder / name).unlink(missing_ok=True)
    write_json(path, {"settings": found, "report": None})
    return dict(found)


def _digest(rows: Sequence[Row]) -> str:
    return digest("\x1f".join(row) for row in rows)[:16]


def synthesis(folder: Path) -> Synthesis | None:
    """Where the making of inputs stands."""
    path = folder / SYNTHESIS
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    return Synthesis(**found | {"rows": [tuple(row) for row in found["rows"]]})


def answers(folder: Path, card: Card) -> Any:
    """The source's answers: probabilities ``(N, C)``, or what it wrote."""
    lines = (folder / INPUTS).read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    if card.task == "lm":
        return [(r["prompt"], r["completion"], r["cut"]) for r in found]
    return torch.tensor([r["probs"] for r in found], dtype=torch.float64)


def of_texts(
    fitted: FittedLanguage, teacher: LanguageModel, source: Path, plan: Any, written: Sequence[tokens.Written]
) -> dict[str, Any]:
    """Nats per byte of what the source wrote, to the student and to the source itself."""
    own = load_language(source, model=plan.source_model)
    out = {}
    for name, model in (("student", fitted), ("source", own)):
        scores = model.scores(tokens.encode(model.task, written))
        out[name] = float(scores.nll.sum() / scores.bytes.sum())
    cut = sum(was for _, _, was in written) / len(written)
    about = {
        "texts": len(written),
        "same_tokenizer": tokens.same_tokenizer(teacher.tokenizer, fitted.task.tokenizer),
    }
    return {"nats_per_byte": out | about | {"cut": cut}}


def finish(
    folder: Path, fitted: Any, options: Options, found: dict[str, Any], report: dict[str, Any]
) -> Transferred:
    """Write the run; its README, which is last, says that it is whole."""
    fitted, sizes = frame.save(folder, fitted)
    write_json(folder / "env.json", versions() | {"command": command()})
    write_json(folder / REPORT, {"settings": found, "report": report})
    write_text_atomically(folder / "README.md", _readme(fitted.card, found, report, sizes))
    return Transferred(folder, fitted, report, sizes)


def _readme(card: Card, found: dict[str, Any], report: dict[str, Any], sizes: dict[str, int]) -> str:
    same = report.get("agreement", {}).get("same")
    agreed = (
        ""
        if same is None
        else f" It says what the source says on {same:.1%} of inputs {report['agreement_on']}."
    )
    judged = report["discriminator"]
    passed = "" if judged is None else f" {report['acceptance']:.0%} of them passed the discriminator."
    return f"""---
base_model: {json.dumps(card.base)}
library_name: peft
tags: [kilobayes, transfer]
---

# {Path(found["run"]).name}, transferred to {card.base}

Trained on {report["inputs"]} made-up inputs with the answers of {found["run"]}, by {found["objective"]}.
Of the task's data {report["real_examples_used"]} rows were there.{passed}{agreed}

How right it is was not measured, and its calibration is at best the source's: `kilobayes evaluate` measures
both on labelled rows. Made-up rows do not vouch for sets and errors, so none are kept for them.

Adapter `{spec.format(spec.adapter(card.adapter))}`, {sizes["adapter"]:,} bytes; posterior
`{card.posterior}`, {sizes["posterior"]:,} bytes; seed {card.seed}, kilobayes {__version__}.
What was done is in `{REPORT}`, what was learned in `{INPUTS}`. This adapter, like the source's, is a
function of the source's data.
"""
