"""The figures of a report, each an inline SVG string (see ``svg.py`` for colours and fonts).

Nothing here touches pyplot or draws a name that came from outside: the titles and legends of arms are HTML.
Arms differ by colour, dash and marker, groups by fill, hatch and position, so figures also read in greyscale.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from kilobayes.metrics.calibration import BINS, reliability, top
from kilobayes.metrics.evaluation import Evaluation
from kilobayes.metrics.uncertainty import entropy, risk_coverage
from kilobayes.report.svg import ARM_COLOURS, colour, inline_svg

Quantity = Literal["entropy", "mutual information"]

FIRST_ROWS = 20
"""Risk-coverage curves start at this many answered rows: the error rate of fewer is too coarse to draw."""

FEW_ROWS = 10
"""Bins of a reliability diagram with fewer rows are drawn faint."""

_WIDTH = 4.6  # inches of 72 units: on a phone one unit is about one pixel, so text stays readable
_HEIGHT = 3.9
_POINTS = 160  # of a curve, at most
_MARKERS = "osD^vPX*"
_DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (7, 2, 1.5, 2), (9, 3), (3, 1.5, 1, 1.5))
_Z = 1.959964  # 97.5 % point of the normal distribution


def reliability_diagram(evaluation: Evaluation, arm: int = 0, bins: int = BINS) -> str:
    """Accuracy and mean confidence in bins of equal width, the gap hatched; below it the rows of each bin."""
    table = reliability(evaluation.probs, evaluation.labels, bins)
    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    axes, rows = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    _dress(axes, "", "accuracy")
    _dress(rows, f"confidence, in {bins} bins of equal width", "rows")
    main = colour(_role(arm))
    for i in np.flatnonzero(table.count):
        left, width = table.edges[i], table.edges[i + 1] - table.edges[i]
        accuracy, confidence = table.accuracy[i], table.confidence[i]
        sure, strength = confidence > accuracy, 1.0 if table.count[i] >= FEW_ROWS else 0.4
        axes.bar(left, accuracy, width, align="edge", color=main, alpha=0.28 * strength, linewidth=0)
        axes.bar(
            left, abs(confidence - accuracy), width, min(confidence, accuracy), align="edge", alpha=strength,
            facecolor="none", edgecolor=colour("wrong" if sure else "right"), linewidth=0.8,
            hatch="////" if sure else "\\\\\\\\",
        )  # fmt: skip
        axes.plot(
            [confidence] * 2,
            wilson(accuracy, table.count[i]),
            color=colour("ink"),
            linewidth=1,
            alpha=strength,
        )
        axes.plot(
            confidence,
            accuracy,
            **(_line(arm) | {"linestyle": "none", "alpha": strength}),
            clip_on=False,
            zorder=3,
        )
        rows.bar(left, table.count[i], width, align="edge", color=main, edgecolor=colour("surface"))
    axes.plot([0, 1], [0, 1], color=colour("ink"), linewidth=1, dashes=(4, 3))
    axes.set(xlim=(0, 1), ylim=(0, 1.03))
    _percent(axes.xaxis, axes.yaxis)
    rows.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    return inline_svg(figure, f"reliability-{arm}")


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
    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    axes = figure.subplots()
    _dress(axes, "coverage: share answered, surest first", "error among the answered")
    axes.axvline(0.8, color=colour("muted"), linewidth=1, dashes=(2, 2))
    for arm, evaluation in enumerate(evaluations):
        coverage, risk = risk_coverage(*top(evaluation.probs, evaluation.labels))
        first = min(FIRST_ROWS, len(risk)) - 1
        points = np.unique(np.linspace(first, len(risk) - 1, _POINTS).round().astype(int))
        # Markers are set off from arm to arm, so that curves on top of each other show both.
        axes.plot(
            coverage[points], risk[points], **_line(arm), markevery=(0.02 * arm + 0.02, 0.16), clip_on=False
        )
    axes.set(xlim=(0, 1))
    axes.set_ylim(bottom=0)
    _percent(axes.xaxis, axes.yaxis)
    return inline_svg(figure, "risk-coverage")


def confidence_histogram(evaluation: Evaluation, arm: int = 0, bins: int = 20) -> str:
    """Confidence of right answers (upwards) and of wrong ones (downwards), in shares of each group."""
    confidence, correct = top(evaluation.probs, evaluation.labels)
    right, wrong = confidence[correct > 0], confidence[correct == 0]
    figure = _mirrored(np.linspace(0, 1, bins + 1), (right, "right", "right"), (wrong, "wrong", "wrong"))
    figure.axes[0].set_xlabel("confidence")
    _percent(figure.axes[0].xaxis)
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
    figure = _mirrored(np.linspace(0, limit, bins + 1), *groups)
    figure.axes[0].set_xlabel(f"{quantity} (nats)")
    return inline_svg(figure, f"{quantity.replace(' ', '-')}-{arm}")


def swatch(arm: int) -> str:
    """The line, dash and marker of an arm as a small picture to put beside its name."""
    figure = Figure(figsize=(0.55, 0.2))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.plot([0.03, 0.5, 0.97], [0.5] * 3, **_line(arm), markevery=[1], clip_on=False)
    return inline_svg(figure, f"swatch-{arm}")


def _mirrored(edges: np.ndarray, *groups: tuple[np.ndarray, str, str]) -> Figure:
    """Two histograms back to back, each with sum 1, so that a small group is not lost beside a large one."""
    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    axes = figure.subplots()
    _dress(axes, "", "share of the group")
    for (values, role, label), sign, hatch in zip(groups, (1, -1), ("", "////"), strict=True):
        count, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
        look = (
            {"facecolor": colour(role), "alpha": 0.85} if not hatch else {"facecolor": "none", "hatch": hatch}
        )
        axes.bar(
            edges[:-1], sign * count / max(len(values), 1), np.diff(edges), align="edge", linewidth=0.8,
            edgecolor=colour(role if hatch else "surface"), label=f"{label}: {len(values)} rows", **look,
        )  # fmt: skip
    axes.axhline(0, color=colour("ink"), linewidth=0.9)
    axes.set(xlim=(edges[0], edges[-1]))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):.0%}"))
    figure.legend(
        loc="outside upper left", ncols=2, frameon=False, fontsize=10, labelcolor=colour("ink"), borderpad=0,
        columnspacing=1.2, handletextpad=0.5,
    )  # fmt: skip
    return figure


def _dress(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.tick_params(colors=colour("muted"), labelsize=9.5, length=0, pad=4)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=colour("grid"), linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(colour("muted"))
    axes.set_xlabel(xlabel, fontsize=10, color=colour("ink"))
    axes.set_ylabel(ylabel, fontsize=10, color=colour("ink"))


def _percent(*axis: Any) -> None:
    for one in axis:
        one.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))


def _role(arm: int) -> str:
    return f"arm-{arm % ARM_COLOURS + 1}"


def _line(arm: int) -> dict[str, Any]:
    # Past the last colour, dashes and markers are out of step with it: arms of one colour still differ.
    dash = _DASHES[(arm + arm // ARM_COLOURS) % len(_DASHES)]
    return {
        "color": colour(_role(arm)),
        "linewidth": 1.8,
        "linestyle": (0, dash) if dash else "-",
        "marker": _MARKERS[arm % len(_MARKERS)],
        "markersize": 6,
        "markeredgecolor": colour("surface"),
        "markeredgewidth": 0.8,
    }
