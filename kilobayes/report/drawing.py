"""How the figures of reports are drawn: axes, bars and lines in the roles of colours that the page has.

Nothing here touches pyplot or draws a name that came from outside: the titles and legends of arms are HTML.
Arms differ by colour, dash and marker, groups by fill, hatch and position, so figures also read in greyscale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from kilobayes.metrics.calibration import Reliability
from kilobayes.report.svg import ARM_COLOURS, colour, inline_svg

FEW_ROWS = 10
"""Bins of a reliability diagram with fewer rows are drawn faint."""

_WIDTH = 4.6  # inches of 72 units: on a phone one unit is about one pixel, so text stays readable
_HEIGHT = 3.9
_MARKERS = "osD^vPX*"
_DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (7, 2, 1.5, 2), (9, 3), (3, 1.5, 1, 1.5))


def blank(*rows: float) -> Figure:
    """A figure of the size that all have, with one pair of axes, or several below each other."""
    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    figure.subplots(max(len(rows), 1), 1, sharex=True, height_ratios=rows or None)
    return figure


def diagram(
    table: Reliability, spans: Sequence[tuple[float, float]], arm: int = 0, unit: str = "rows"
) -> str:
    """Accuracy and mean confidence in bins of equal width, the gap hatched; below it the rows of each bin.

    Args:
        spans: an interval of each bin's accuracy.
        unit: what a bin counts.
    """
    figure = blank(4, 1)
    axes, rows = figure.axes
    dress(axes, "", "accuracy")
    dress(rows, f"confidence, in {len(table.count)} bins of equal width", unit)
    main = colour(role(arm))
    for i in np.flatnonzero(table.count).tolist():
        left, width = table.edges[i], table.edges[i + 1] - table.edges[i]
        accuracy, confidence = table.accuracy[i], table.confidence[i]
        sure, strength = confidence > accuracy, 1.0 if table.count[i] >= FEW_ROWS else 0.4
        axes.bar(left, accuracy, width, align="edge", color=main, alpha=0.28 * strength, linewidth=0)
        axes.bar(
            left, abs(confidence - accuracy), width, min(confidence, accuracy), align="edge", alpha=strength,
            facecolor="none", edgecolor=colour("wrong" if sure else "right"), linewidth=0.8,
            hatch="////" if sure else "\\\\\\\\",
        )  # fmt: skip
        axes.plot([confidence] * 2, spans[i], color=colour("ink"), linewidth=1, alpha=strength)
        axes.plot(
            confidence,
            accuracy,
            **(line(arm) | {"linestyle": "none", "alpha": strength}),
            clip_on=False,
            zorder=3,
        )
        rows.bar(left, table.count[i], width, align="edge", color=main, edgecolor=colour("surface"))
    axes.plot([0, 1], [0, 1], color=colour("ink"), linewidth=1, dashes=(4, 3))
    axes.set(xlim=(0, 1), ylim=(0, 1.03))
    percent(axes.xaxis, axes.yaxis)
    rows.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    return inline_svg(figure, f"reliability-{arm}")


def swatch(arm: int) -> str:
    """The line, dash and marker of an arm as a small picture to put beside its name."""
    figure = Figure(figsize=(0.55, 0.2))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.plot([0.03, 0.5, 0.97], [0.5] * 3, **line(arm), markevery=[1], clip_on=False)
    return inline_svg(figure, f"swatch-{arm}")


def mirrored(edges: np.ndarray, *groups: tuple[np.ndarray, str, str], unit: str = "rows") -> Figure:
    """Two histograms back to back, each with sum 1, so that a small group is not lost beside a large one.

    Args:
        groups: values, the role of their colour, and what they are called.
        unit: what a value is of.
    """
    figure = blank()
    (axes,) = figure.axes
    dress(axes, "", "share of the group")
    for (values, role, label), sign, hatch in zip(groups, (1, -1), ("", "////")):
        count, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
        look = (
            {"facecolor": colour(role), "alpha": 0.85} if not hatch else {"facecolor": "none", "hatch": hatch}
        )
        axes.bar(
            edges[:-1], sign * count / max(len(values), 1), np.diff(edges), align="edge", linewidth=0.8,
            edgecolor=colour(role if hatch else "surface"), label=f"{label}: {len(values):,} {unit}", **look,
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


def dress(axes: Axes, xlabel: str, ylabel: str) -> None:
    """Labels and a grid, without a frame."""
    axes.tick_params(colors=colour("muted"), labelsize=9.5, length=0, pad=4)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=colour("grid"), linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(colour("muted"))
    axes.set_xlabel(xlabel, fontsize=10, color=colour("ink"))
    axes.set_ylabel(ylabel, fontsize=10, color=colour("ink"))


def percent(*axis: Any) -> None:
    """Shares as percentages along these."""
    for one in axis:
        one.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))


def role(arm: int) -> str:
    """The role of an arm's colour."""
    return f"arm-{arm % ARM_COLOURS + 1}"


def line(arm: int) -> dict[str, Any]:
    """How an arm's line looks."""
    # Past the last colour, dashes and markers are out of step with it: arms of one colour still differ.
    dash = _DASHES[(arm + arm // ARM_COLOURS) % len(_DASHES)]
    return {
        "color": colour(role(arm)),
        "linewidth": 1.8,
        "linestyle": (0, dash) if dash else "-",
        "marker": _MARKERS[arm % len(_MARKERS)],
        "markersize": 6,
        "markeredgecolor": colour("surface"),
        "markeredgewidth": 0.8,
    }
