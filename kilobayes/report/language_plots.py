"""The figures of a report on language models, each an inline SVG string."""

from __future__ import annotations

from typing import Literal

import numpy as np

from kilobayes.metrics.calibration import Reliability
from kilobayes.metrics.intervals import Interval
from kilobayes.metrics.texts import TextEvaluation
from kilobayes.report.drawing import diagram, mirrored
from kilobayes.report.svg import inline_svg

Quantity = Literal["nll", "entropy", "information"]
LABELS = {
    "nll": "negative log-likelihood of a document (nats per token)",
    "entropy": "mean entropy of a document (nats)",
    "information": "mean mutual information of a document (nats)",
}
_WIDEST = 0.99  # quantile of documents that the axis reaches to


def reliability_diagram(found: tuple[Reliability, list[Interval]], arm: int = 0) -> str:
    """Of the most probable token, with intervals from resampled documents."""
    table, intervals = found
    spans = [(one.low, one.high) if np.isfinite(one.low) else (one.value, one.value) for one in intervals]
    return diagram(table, spans, arm, "tokens")


def shift_histogram(
    evaluation: TextEvaluation, quantity: Quantity, arm: int = 0, bins: int = 20
) -> str | None:
    """Means over the tokens of test documents (upwards) and of out-of-distribution documents (downwards).

    Returns:
        None where it is zero everywhere, as the mutual information of a point is; or where only the loss is
        of interest, as without documents of another kind.
    """
    groups = [(evaluation.scores.means(getattr(evaluation.scores, quantity)), "inside", "test set")]
    if evaluation.ood is not None:
        other = evaluation.ood.means(getattr(evaluation.ood, quantity))
        groups.append((other, "outside", "out of distribution"))
    elif quantity != "nll":
        return None
    high = max(float(np.quantile(values, _WIDEST)) for values, _, _ in groups)
    low = min(float(values.min()) for values, _, _ in groups)
    if high < 1e-6:
        return None
    low = 0.0 if quantity == "information" else max(0.0, low - 0.05 * (high - low))
    figure = mirrored(np.linspace(low, max(high, low + 1e-6), bins + 1), *groups, unit="texts")
    figure.axes[0].set_xlabel(LABELS[quantity])
    return inline_svg(figure, f"{quantity}-{arm}")
