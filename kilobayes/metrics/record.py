"""The record of one run on one test set, which metrics read and reports show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from kilobayes.errors import KilobayesError


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Predictions of one run on N test rows with C classes, and perhaps on M out-of-distribution (OOD) rows.

    Attributes:
        name: what tables and plots call the run, such as "LoRA + temperature".
        classes: the C class names.
        labels: true classes ``(N,)``, whole numbers from 0 to C - 1.
        probs: probabilities ``(N, C)`` averaged over posterior samples.
        mutual_information: nats ``(N,)``, zeros for a point estimate.
        texts: the N inputs as a person would read them; pairs joined with " / ".
        ood_probs: ``(M, C)``, or None.
        ood_mutual_information: nats ``(M,)``, or None.
        ood_texts: the M inputs, or None.
        cost: numbers such as ``seconds``, ``peak_bytes``, ``trained_bytes`` and ``stored_bytes``.
        spec: what was run (adapter, posterior, model, data), as shown in the report.

    Raises:
        KilobayesError: shapes disagree, a label is no class, or a row of probabilities does not sum to 1.
    """

    name: str
    classes: list[str]
    labels: np.ndarray
    probs: np.ndarray
    mutual_information: np.ndarray
    texts: list[str]
    ood_probs: np.ndarray | None = None
    ood_mutual_information: np.ndarray | None = None
    ood_texts: list[str] | None = None
    cost: Mapping[str, float] = field(default_factory=dict)
    spec: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows, width = len(self.labels), len(self.classes)
        if rows == 0 or not np.issubdtype(self.labels.dtype, np.integer):
            _refuse(
                self.name, "labels", f"{rows} of dtype {self.labels.dtype}", "whole numbers, one for each row"
            )
        if self.labels.ndim != 1 or self.labels.min() < 0 or self.labels.max() >= width:
            _refuse(self.name, "labels", f"{sorted(set(self.labels.ravel()))}", f"classes 0 to {width - 1}")
        _check_predictions(self.name, "", self.probs, self.mutual_information, self.texts, rows, width)
        if self.ood_probs is not None:
            parts = (self.ood_probs, self.ood_mutual_information, self.ood_texts)
            _check_predictions(self.name, "ood_", *parts, len(self.ood_probs), width)


def _check_predictions(
    name: str,
    prefix: str,
    probs: np.ndarray,
    mutual_information: np.ndarray | None,
    texts: list[str] | None,
    rows: int,
    width: int,
) -> None:
    if probs.shape != (rows, width):
        _refuse(name, f"{prefix}probs", f"shape {probs.shape}", f"shape ({rows}, {width})")
    # Half-precision probabilities are off by up to about 1e-3 in their sum.
    if rows == 0 or not np.all(probs >= 0) or not np.allclose(probs.sum(axis=1), 1.0, atol=1e-2):
        _refuse(name, f"{prefix}probs", "rows that are no distribution", "non-negative rows that sum to 1")
    if mutual_information is not None and np.shape(mutual_information) != (rows,):
        _refuse(
            name, f"{prefix}mutual_information", f"shape {np.shape(mutual_information)}", f"shape ({rows},)"
        )
    if texts is not None and len(texts) != rows:
        _refuse(name, f"{prefix}texts", f"{len(texts)}", f"{rows}")


def _refuse(name: str, what: str, found: str, expected: str) -> None:
    raise KilobayesError(f"{what} of {name!r} cannot be evaluated", f"found {found}", f"give {expected}")
