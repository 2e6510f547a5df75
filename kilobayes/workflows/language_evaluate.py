"""Figures, excerpts and the report of language models on documents, one run or several side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kilobayes import spec
from kilobayes.files import write_json
from kilobayes.lm.replies import after
from kilobayes.metrics import Interval
from kilobayes.metrics.language import TokenScores, summarise
from kilobayes.metrics.texts import Excerpt, TextEvaluation, to_json
from kilobayes.posteriors import ask
from kilobayes.tasks.packing import IGNORED, Tokens
from kilobayes.tasks.text import Documents
from kilobayes.workflows.language import FittedLanguage

SHOWN, READ = (
    160,
    60,
)  # tokens of the documents of a kind that are shown, and of what was read before an answer


def evaluate(
    fitted: FittedLanguage,
    documents: Documents,
    ood: Documents | None = None,
    *,
    name: str = "",
    samples: int | None = None,
) -> TextEvaluation:
    """A run on documents, and on documents of another kind.

    Raises:
        KilobayesError: fewer than one sample, or nothing to learn in the documents.
    """
    found: list[TokenScores] = []
    shown: list[Excerpt] = []
    for outside, some in enumerate((documents, ood)):
        if some:
            tokens = fitted.task.encode(some)
            found.append(fitted.scores(tokens, samples))
            shown += excerpts(fitted.task.tokenizer, tokens, found[-1], bool(outside))
    card = fitted.card
    about = {
        "model": card.base,
        "adapter": spec.format(spec.adapter(card.adapter)),
        "posterior": spec.format(fitted.posterior),
        "samples": str(ask.count(fitted.posterior, fitted.state, samples or card.samples)),
        "seed": str(card.seed),
    }
    return TextEvaluation(
        name=name or arm_name(fitted),
        scores=found[0],
        ood=found[1] if len(found) > 1 else None,
        excerpts=shown,
        cost=fitted.cost,
        spec=about,
    )


def arm_name(fitted: FittedLanguage) -> str:
    """Such as ``LoRA + Temperature(SWAG())``."""
    return f"{type(spec.adapter(fitted.card.adapter)).__name__} + {spec.format(fitted.posterior)}"


def excerpts(tokenizer: Any, tokens: Tokens, scores: TokenScores, outside: bool) -> list[Excerpt]:
    """The first documents, until so many tokens are shown that a page has enough of them."""
    out: list[Excerpt] = []
    left, start = SHOWN, 0
    for document, count in enumerate(scores.counts.tolist()):
        if count and left > 0:
            ids, learned = _read(tokens, document)
            first = learned.index(True)
            ids, learned = ids[max(first - READ, 0) :], learned[max(first - READ, 0) :]
            end = int(np.searchsorted(np.cumsum(learned), min(left, count))) + 1
            out.append(_excerpt(tokenizer, ids[:end], learned[:end], scores, start, outside))
            left -= count
        start += count
    return out


def _read(tokens: Tokens, document: int) -> tuple[list[int], list[bool]]:
    """A document's tokens from its windows, and which of them were scored."""
    rows = [row for row, owner in enumerate(tokens.documents) if owner == document]
    ids, learned = [tokens.ids[rows[0]][0]], [False]
    for row in rows:
        follow = [*tokens.ids[row][1:], IGNORED]  # what comes last is only a label
        for label, token in zip(tokens.labels[row], follow, strict=True):
            if max(label, token) != IGNORED:
                ids.append(token if label == IGNORED else label)
                learned.append(label != IGNORED)
    return ids, learned


def _excerpt(
    tokenizer: Any, ids: list[int], learned: list[bool], scores: TokenScores, start: int, outside: bool
) -> Excerpt:
    pieces = [
        after(tokenizer, ids[max(at - 1, 0) : at], [token], special=True) for at, token in enumerate(ids)
    ]
    place = start + np.cumsum(learned) - 1
    columns = (
        np.where(learned, values[place], np.nan)
        for values in (scores.nll, scores.entropy, scores.information)
    )
    return Excerpt(outside, pieces, *columns)


def write_outputs(
    folder: Path, evaluations: Sequence[TextEvaluation], meta: dict[str, Any]
) -> list[dict[str, Interval]]:
    """``metrics.json`` and ``report.html``; returns the summaries."""
    from kilobayes.report.language import write_report

    summaries = [summarise(one.scores, one.ood) for one in evaluations]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "metrics.json", to_json(evaluations, summaries, meta))
    write_report(folder / "report.html", evaluations, summaries, meta)
    return summaries


def figures(summary: Mapping[str, Interval]) -> dict[str, Any]:
    """Values and limits as JSON takes them; what is not defined is null."""
    return {
        k: [None if v != v else round(float(v), 6) for v in (i.value, i.low, i.high)]
        for k, i in summary.items()
    }
