"""The figures of a report on classes, each an inline SVG string (see ``svg.py`` for colours and fonts)."""

from __future__ import annotations

from typing import Literal

import numpy as np

from kilobayes.metrics.calibration import BINS, reliability, top
from kilobayes.metrics.evaluation import Evaluation
from kilobayes.metrics.uncertainty import entropy, risk_coverage
from kilobayes.report.drawing import blank, diagram, dress, line, mirrored, percent
from kilobayes.report.svg import colour, inline_svg

Quantity = Literal["entropy", "mutual information"]

FIRST_ROWS = 20
"""Risk-coverage curves start at this many answered rows: the error rate of fewer is too coarse to draw."""

_POINTS = 160  # of a curve, at most
_Z = 1.959964  # 97.5 % point of the normal distribution


def reliability_diagram(evaluation: Evaluation, arm: int = 0, bins: int = BINS) -> str:
    """Accuracy and mean confidence in bins of equal width, the gap hatched; below it the rows of each bin."""
    table = reliability(evaluation.probs, evaluation.labels, bins)
    pairs = zip(table.accuracy, table.count, strict=True)
    return diagram(table, [wilson(a, n) if n else (a, a) for a, n in pairs], arm)


def wilson(share: float, count: float) -> tuple[float, float]:
    """The 95 % Wilson interval of a share observed on ``count`` rows."""
    centre, spread = (
        share + _Z**2 / (2 * count),
        _Z * np.sqrt(share * (1 - share) / count + (_Z / (2 * count)) ** 2),
    )
    scale = 1 + _Z**2 / count
    return float((centre - spread) / scale), float((centre + spread) / scale)


def risk_coverage_curves(evaluations: list[Evaluation]) -> str:
    """Error among the answered rows when only the surest are answered, a curve an arm (arXiv:1705.08500)."""
    figure = blank()
    (axes,) = figure.axes
    dress(axes, "coverage: share answered, surest first", "error among the answered")
    axes.axvline(0.8, color=colour("muted"), linewidth=1, dashes=(2, 2))
    for arm, evaluation in enumerate(evaluations):
        coverage, risk = risk_coverage(*top(evaluation.probs, evaluation.labels))
        first = min(FIRST_ROWS, len(risk)) - 1
        points = np.unique(np.linspace(first, len(risk) - 1, _POINTS).round().astype(int))
        # Markers are set off from arm to arm, so that curves on top of each other show both.
        axes.plot(
            coverage[points], risk[points], **line(arm), markevery=(0.02 * arm + 0.02, 0.16), clip_on=False
        )
    axes.set(xlim=(0, 1))
    axes.set_ylim(bottom=0)
    percent(axes.xaxis, axes.yaxis)
    return inline_svg(figure, "risk-coverage")


def confidence_histogram(evaluation: Evaluation, arm: int = 0, bins: int = 20) -> str:
    """Confidence of right answers (upwards) and of wrong ones (downwards), in shares of each group."""
    confidence, correct = top(evaluation.probs, evaluation.labels)
    right, wrong = confidence[correct > 0], confidence[correct == 0]
    figure = mirrored(np.linspace(0, 1, bins + 1), (right, "right", "right"), (wrong, "wrong", "wrong"))
    figure.axes[0].set_xlabel("confidence")
    percent(figure.axes[0].xaxis)
    return inline_svg(figure, f"confidence-{arm}")


def shift_histogram(
    evaluation: Evaluation, arm: int = 0, bins: int = 20, quantity: Quantity = "entropy"
) -> str | None:
    """Uncertainty of test rows (upwards) and out-of-distribution rows (downwards), in shares of each group.

    Args:
        quantity: "entropy" of the averaged probabilities, or "mutual information" of class and adapter; nats.

    Returns:
        None when there are no out-of-distribution rows, or no mutual information (a point estimate has none).
    """
    if quantity == "entropy":
        inside, outside = entropy(evaluation.probs), None
        outside = None if evaluation.ood_probs is None else entropy(evaluation.ood_probs)
        limit = float(np.log(max(len(evaluation.classes), 2)))
    else:
        inside, outside = evaluation.mutual_information, evaluation.ood_mutual_information
        limit = 0.0 if outside is None else float(max(inside.max(), outside.max()))
    if outside is None or limit < 1e-6:
        return None
    groups = (inside, "inside", "test set"), (outside, "outside", "out of distribution")
    figure = mirrored(np.linspace(0, limit, bins + 1), *groups)
    figure.axes[0].set_xlabel(f"{quantity} (nats)")
    return inline_svg(figure, f"{quantity.replace(' ', '-')}-{arm}")
