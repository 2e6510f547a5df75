"""Which rows to show: where the model was surest, wrong, torn, or met something it does not know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kilobayes.metrics.calibration import top
from kilobayes.metrics.evaluation import Evaluation
from kilobayes.metrics.uncertainty import entropy

LONGEST = 300
"""Characters of a text that are shown."""


@dataclass(frozen=True)
class Example:
    """One row; ``guesses`` are the two most probable classes, ``truth`` is None out of distribution."""

    row: int
    text: str
    guesses: list[tuple[str, float]]
    truth: str | None


@dataclass(frozen=True)
class Group:
    """Rows chosen by one rule, which ``rule`` says in words."""

    title: str
    rule: str
    examples: list[Example]


def choose(evaluation: Evaluation, count: int = 4) -> list[Group]:
    """The groups of a report, at most ``count`` rows each; groups without rows are left out.

    Rows tie-break by their order in the data, so the choice is reproducible.
    """
    confidence, correct = top(evaluation.probs, evaluation.labels)
    ordered = np.sort(evaluation.probs, axis=1)
    margin = ordered[:, -1] - (ordered[:, -2] if ordered.shape[1] > 1 else 0.0)
    surest = np.argsort(-confidence, kind="stable")
    test = evaluation.probs, evaluation.texts, evaluation.labels, evaluation.classes, count
    groups = [
        Group("Surest and right", "highest confidence", _take(surest[correct[surest] > 0], *test)),
        Group("Surest and wrong", "highest confidence", _take(surest[correct[surest] == 0], *test)),
        Group(
            "Most torn", "smallest lead of the first class", _take(np.argsort(margin, kind="stable"), *test)
        ),
    ]
    if evaluation.ood_probs is not None:
        unfamiliar = np.argsort(-entropy(evaluation.ood_probs), kind="stable")
        texts = evaluation.ood_texts or [""] * len(unfamiliar)
        outside = evaluation.ood_probs, texts, None, evaluation.classes, count
        groups += [
            Group("Out of distribution, and it shows", "highest entropy", _take(unfamiliar, *outside)),
            Group("Out of distribution, unnoticed", "lowest entropy", _take(unfamiliar[::-1], *outside)),
        ]
    return [group for group in groups if group.examples]


def _take(
    rows: np.ndarray,
    probs: np.ndarray,
    texts: Sequence[str],
    labels: np.ndarray | None,
    classes: Sequence[str],
    count: int,
) -> list[Example]:
    found = []
    for row in rows[:count].tolist():
        best = np.argsort(-probs[row], kind="stable")[:2].tolist()
        found.append(
            Example(
                row=row,
                text=_shorten(texts[row]),
                guesses=[(classes[index], float(probs[row, index])) for index in best],
                truth=None if labels is None else classes[int(labels[row])],
            )
        )
    return found


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST].rstrip() + "…"
