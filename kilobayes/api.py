"""What the package offers in Python beside the classifier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kilobayes.estimator import Classifier
from kilobayes.tasks.data import available_splits, load_examples
from kilobayes.workflows import compare as _compare
from kilobayes.workflows.data import first_test


def load(folder: str | Path, *, model: str | None = None, device: str = "auto") -> Classifier:
    """A fitted classifier from a run's folder: ``kb.load("runs/a").predict_proba(texts)``.

    Raises:
        KilobayesError: no run there, damaged files, or another base than it was trained on.
    """
    return Classifier.load(folder, model=model, device=device)


def compare(
    runs: Sequence[str | Path],
    test: Any,
    ood: Any = None,
    *,
    out: str | Path = "runs/compare",
    split: str | None = None,
    limit: int | None = None,
    samples: int | None = None,
) -> _compare.Compared:
    """Evaluate runs on the same labelled rows; ``report.html`` and ``metrics.json`` go to ``out``.

    Args:
        test, ood: what :func:`kilobayes.tasks.data.load_examples` reads: a file, a folder, a hub id,
            a data frame.

    Raises:
        KilobayesError: no runs, a damaged one, or runs of different classes.
    """

    def rows(classes: list[str]) -> tuple[Any, Any, str]:
        name = split or first_test(available_splits(test))
        other = None
        if ood is not None:
            other = load_examples(ood, first_test(available_splits(ood)), need_labels=False, limit=limit)
        return load_examples(test, name, classes=classes, limit=limit), other, name or ""

    return _compare.compare([Path(r) for r in runs], rows, Path(out), str(test), samples)
