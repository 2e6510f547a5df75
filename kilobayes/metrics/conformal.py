r"""Sets of labels that hold the right one as often as asked, and refusing rows so that errors stay rare.

Both are computed with MAPIE (https://mapie.readthedocs.io) from calibration rows: rows with labels that were
not trained on, exchangeable with those to come. Nothing is assumed of how good the probabilities are.

*Split conformal sets.* With "lac" (Sadinle et al., arXiv:1609.00451) a label is in the set if its probability
is at least 1 - q, where q is the :math:`\lceil (n + 1) c \rceil`-th smallest :math:`1 - p_{y_i}(x_i)` of the
n calibration rows; then :math:`c \le P(y \in \text{set}) \le c + 1 / (n + 1)` on average over calibration
rows and rows to come. "aps" (Romano et al., arXiv:2006.02544) and "raps" (Angelopoulos et al.,
arXiv:2009.14193) add up probabilities from the largest down and give larger sets to harder rows; "top_k"
gives every row as many.

*Risk control.* Learn then test (Angelopoulos et al., arXiv:2110.01052): for thresholds t on the confidence,
from 0.99 down, the hypothesis "of the rows of confidence t and above more than alpha are wrong" is tested by
the binomial's p-value :math:`P(\operatorname{Bin}(n_t, \alpha) \le \text{errors}_t)`, in a fixed sequence
from three starts, so that with the asked confidence no threshold is wrongly called safe. The lowest safe one
accepts most rows.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from kilobayes.errors import KilobayesError, nearest

METHODS = ("lac", "aps", "raps", "top_k")
THRESHOLDS, STARTS = 51, 3


@dataclass(frozen=True, eq=False)
class Calibration:
    """Labelled rows that were not trained on, as the model sees them.

    Attributes:
        probs: ``(n, C)`` float32.
        labels: ``(n,)`` class indices.
    """

    probs: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        if self.probs.ndim != 2 or self.labels.shape != self.probs.shape[:1]:
            raise ValueError(f"probabilities {self.probs.shape}, labels {self.labels.shape}")
        inside = self.labels.size == 0 or 0 <= self.labels.min() <= self.labels.max() < self.probs.shape[1]
        if not inside or not np.allclose(self.probs.sum(axis=1), 1.0, atol=1e-3):
            raise ValueError("these are no probabilities of classes")


class _Given:
    """What MAPIE takes for a classifier: the rows are the probabilities."""

    def __init__(self, classes: int) -> None:
        self.classes_ = np.arange(classes)
        self.is_fitted_ = True

    def fit(self, X: Any, y: Any) -> _Given:
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        return np.asarray(X, dtype=float)

    def predict(self, X: Any) -> np.ndarray:
        return self.predict_proba(X).argmax(axis=1)


def sets(
    calibration: Calibration, probs: np.ndarray, coverage: float = 0.9, method: str = "lac"
) -> np.ndarray:
    """Which labels are in each row's set: ``(N, C)`` booleans.

    With "lac" a set may be empty, where no label is as likely as calibration rows' right ones were.

    Args:
        probs: of the rows to come ``(N, C)``.
        coverage: c, the share of sets that hold the right label.
        method: lac, aps, raps or top_k; two classes only know lac.

    Raises:
        KilobayesError: MAPIE is missing; too few calibration rows for the coverage; no such method.
    """
    check(coverage, method)
    need = math.ceil(1.0 / min(coverage, 1.0 - coverage) - 1e-9) + 1  # as MAPIE does
    rows = len(calibration.labels)
    if method == "raps":  # a fifth of the rows choose its regularisation
        need = math.ceil(need / 0.8)
    if rows < need:
        raise KilobayesError(
            f"sets of coverage {coverage:g} need at least {need} calibration rows", f"found {rows}",
            "give more, as in --held-out FILE, or ask for less",
        )  # fmt: skip
    if calibration.probs.shape[1] == 2 and method != "lac":
        raise KilobayesError(f"with two classes sets are made by lac, not by {method}", remedy="leave it out")
    needed()
    from mapie.classification import SplitConformalClassifier

    made = SplitConformalClassifier(
        estimator=_Given(calibration.probs.shape[1]),
        confidence_level=coverage,
        conformity_score=method,
        random_state=0,
    )
    try:
        made.conformalize(_single(calibration.probs), calibration.labels)
        _, found = made.predict_set(_single(probs))
    except ValueError as error:
        raise KilobayesError(f"{method} does not work on these calibration rows", str(error)) from error
    return np.asarray(found[:, :, 0], dtype=bool)


def _single(probs: np.ndarray) -> np.ndarray:
    """As they are stored, so that a reloaded run gives the same sets."""
    return np.asarray(probs, dtype=np.float32).astype(float)


def threshold(calibration: Calibration, max_error: float, confidence: float = 0.9) -> float:
    """The lowest confidence above which at most ``max_error`` of the rows are wrong.

    Args:
        max_error: alpha, the largest share of wrong labels among the rows accepted.
        confidence: probability, over calibration rows, that the threshold keeps what it promises.

    Raises:
        KilobayesError: MAPIE is missing, or no threshold can be called safe on these rows.
    """
    for name, value in (("max_error", max_error), ("confidence", confidence)):
        if not 0.0 < value < 1.0:
            raise KilobayesError(f"{name} is a share between 0 and 1", f"found {value:g}")
    needed()
    from mapie.risk_control import FWERFixedSequenceTesting, control_fwer
    from scipy.stats import binom

    top = _single(calibration.probs).max(axis=1)
    wrong = calibration.probs.argmax(axis=1) != calibration.labels
    grid = np.linspace(0.99, 1.0 / calibration.probs.shape[1], THRESHOLDS)
    taken = top[None, :] >= grid[:, None]
    errors, counts = (taken & wrong).sum(axis=1), taken.sum(axis=1)
    p_values = np.where(counts > 0, binom.cdf(errors, counts, max_error), 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        safe = control_fwer(p_values, 1.0 - confidence, FWERFixedSequenceTesting(n_starts=STARTS))
    if not len(safe):
        best = int(p_values.argmin())
        least = math.ceil(math.log((1.0 - confidence) / STARTS) / math.log(1.0 - max_error))
        raise KilobayesError(
            f"no threshold keeps errors below {max_error:g} with {confidence:.0%} confidence",
            f"{counts[best]} of {len(top)} calibration rows are at {grid[best]:.2f} or above, "
            f"{errors[best]} of them wrong",
            f"allow more errors, or name more rows with --held-out: {least} without an error is the least",
        )
    return float(grid[safe].min())


def observed(found: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """How often sets ``(N, C)`` hold the label ``(N,)``, how large they are, how many are empty or single."""
    size = found.sum(axis=1)
    return {
        "coverage": float(found[np.arange(len(labels)), labels].mean()),
        "set_size": float(size.mean()),
        "empty_sets": float((size == 0).mean()),
        "single_sets": float((size == 1).mean()),
    }


def check(coverage: float, method: str) -> None:
    """Refuse what cannot be asked for, before anything is loaded."""
    if not 0.0 < coverage < 1.0:
        raise KilobayesError("coverage is a share between 0 and 1", f"found {coverage:g}", "as in 0.9")
    if method not in METHODS:
        guess = nearest(method, METHODS)
        raise KilobayesError(
            f"there is no method {method!r} for sets", f"known: {', '.join(METHODS)}",
            f"did you mean {guess}?" if guess else "",
        )  # fmt: skip


def missing() -> KilobayesError:
    """What to say of a run without calibration rows."""
    return KilobayesError(
        "sets and risk control need labelled rows that were not trained on", "the run keeps none",
        "name some with --held-out FILE, or train with --calibration 0.2",
    )  # fmt: skip


def needed() -> None:
    """Refuse to go on without MAPIE."""
    if importlib.util.find_spec("mapie") is None:
        raise KilobayesError(
            "sets and risk control are computed by MAPIE", "which is not installed",
            'pip install "kilobayes[conformal]"', exit_code=3,
        )  # fmt: skip
