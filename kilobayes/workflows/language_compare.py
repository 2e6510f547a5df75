"""Several runs of language models on the same documents, paired where they scored the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kilobayes.metrics import Interval, Spread
from kilobayes.metrics.texts import TextEvaluation, differences
from kilobayes.tasks.text import Documents
from kilobayes.workflows.compare import check_named, plain, pool
from kilobayes.workflows.evaluate import metadata
from kilobayes.workflows.folder import stored_cost
from kilobayes.workflows.language import load
from kilobayes.workflows.language_evaluate import arm_name, evaluate, figures, write_outputs

Texts = Callable[[], tuple[Documents, Documents | None, str]]


@dataclass(frozen=True, eq=False)
class ComparedTexts:
    """Evaluations on the same documents, their summaries, and the spread over seeds by arm.

    Attributes:
        less_first: of each run but the first, its figures less those of the first, paired by documents; a
            figure that may not be compared is left out, which ``notes`` say.
    """

    evaluations: list[TextEvaluation]
    summaries: list[dict[str, Interval]]
    less_first: list[dict[str, Interval]]
    spreads: dict[str, dict[str, Spread]]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        runs: list[dict[str, Any]] = [
            {"name": one.name, "metrics": figures(summary), **one.spec}
            for one, summary in zip(self.evaluations, self.summaries, strict=True)
        ]
        for run, found in zip(runs[1:], self.less_first, strict=True):
            run["less_first"] = figures(found)
        return {"runs": runs, "over_seeds": plain(self.spreads)}


def compare(
    folders: Sequence[Path],
    texts: Texts,
    out: Path,
    data: str,
    samples: int | None = None,
    model: str | None = None,
    device: str = "auto",
) -> ComparedTexts:
    """Evaluate each run on the same documents and write one table and one report into ``out``.

    Args:
        texts: gives documents, documents of another kind or None, and the split's name.

    Raises:
        KilobayesError: fewer than one run, one twice, a damaged one, or one that is no language model's.
    """
    check_named(folders)
    documents, other, split = texts()
    evaluations = []
    for folder in folders:
        fitted = load(folder, model=model, device=device)
        fitted = replace(fitted, cost=stored_cost(folder))
        name = f"{folder.name}: {arm_name(fitted)}" if len(folders) > 1 else arm_name(fitted)
        evaluations.append(evaluate(fitted, documents, other, name=name, samples=samples))
    paired = differences(evaluations)
    facts = {"source": data, "split": split, "rows": len(documents)}
    notes = notes_on(evaluations, paired)
    meta = metadata(f"Runs compared on {data}", facts, notes)
    summaries = write_outputs(out, evaluations, meta)
    spreads = pool(folders, [one.spec for one in evaluations], summaries)
    return ComparedTexts(evaluations, summaries, paired, spreads, notes)


def notes_on(evaluations: Sequence[TextEvaluation], paired: Sequence[dict[str, Interval]]) -> list[str]:
    """What may not be compared, and why."""
    first, out = evaluations[0].name, []
    for one, found in zip(evaluations[1:], paired, strict=True):
        if not found:
            out.append(
                f"{one.name} scored other parts of the texts than {first}, as their --max-length or "
                "tokenizers differ: no figures compare."
            )
        elif "nll" not in found:
            out.append(f"{one.name} cuts texts into other tokens than {first}: only bits per byte compare.")
    return out
