"""The figures: what they draw, and that they are safe to put into a page."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib import rcParams

from kilobayes.metrics.evaluation import Evaluation
from kilobayes.report import drawing, plots, svg

from . import simulated


@pytest.fixture(scope="module")
def arms() -> list[Evaluation]:
    return simulated.four_arms()


def figures(arms: list[Evaluation]) -> dict[str, str]:
    drawn = {
        "reliability": plots.reliability_diagram(arms[2], 2),
        "coverage": plots.risk_coverage_curves(arms),
        "confidence": plots.confidence_histogram(arms[2], 2),
        "entropy": plots.shift_histogram(arms[2], 2),
        "information": plots.shift_histogram(arms[2], 2, quantity="mutual information"),
        "swatch": drawing.swatch(2),
    }
    return {name: picture for name, picture in drawn.items() if picture}


def test_figures_take_colours_fonts_and_size_from_the_page(arms: list[Evaluation]) -> None:
    settings = dict(rcParams)
    drawn = figures(arms)
    assert len(drawn) == 6
    for name, picture in drawn.items():
        root = ElementTree.fromstring(picture)
        assert root.tag == "svg", name
        assert set(root.attrib) == {"viewBox", "aria-hidden", "focusable"}
        # Every colour is a variable of the style sheet that some role names.
        assert not re.search(r"#[0-9a-f]{6}", picture), name
        assert set(re.findall(r"var\(--([\w-]+)\)", picture)) <= set(svg.ROLES)
        assert "font-family" not in picture
        assert "http" not in picture
        assert not [
            element.tag for element in root.iter() if element.tag in ("style", "metadata", "script", "use")
        ]
        assert len(picture) < 60_000, name
    assert dict(rcParams) == settings


def test_every_reference_inside_a_figure_resolves_and_ids_carry_its_key(arms: list[Evaluation]) -> None:
    seen: set[str] = set()
    for picture in figures(arms).values():
        ids = re.findall(r' id="([^"]+)"', picture)
        assert set(re.findall(r"url\(#([^)]+)\)", picture)) == set(ids)
        assert len(ids) == len(set(ids))
        assert not seen & set(ids)
        seen |= set(ids)
    assert seen
    assert 'id="' not in drawing.swatch(0)  # it stands on a page many times


def test_same_numbers_give_the_same_picture(arms: list[Evaluation]) -> None:
    assert figures(arms) == figures(arms)


def test_reliability_bars_have_the_heights_of_the_bins() -> None:
    # 10 bins: 40 rows at 0.55, 30 of them right, and 60 rows at 0.95, all right.
    confidence = np.r_[np.full(40, 0.55), np.full(60, 0.95)]
    labels = (np.arange(100) < 10).astype(int)
    arm = Evaluation(
        "a", ["x", "y"], labels, np.stack([confidence, 1 - confidence], 1), np.zeros(100), ["t"] * 100
    )
    heights = _bars(plots.reliability_diagram(arm, bins=10), "--arm-1")
    accuracies, counts = heights[:2], heights[2:]
    assert accuracies[0] / accuracies[1] == pytest.approx(0.75, rel=1e-3)
    assert counts[0] / counts[1] == pytest.approx(40 / 60, rel=1e-3)


def test_histograms_are_shares_of_their_group() -> None:
    # Three right rows and one wrong row, all in one bin: both bars stand for 100 %.
    arm = Evaluation(
        "a", ["x", "y"], np.array([0, 0, 0, 1]), np.tile([0.9, 0.1], (4, 1)), np.zeros(4), ["t"] * 4
    )
    picture = plots.confidence_histogram(arm)
    assert "right: 3 rows" in picture
    assert "wrong: 1 rows" in picture
    right = max(_bars(picture, "--right"))
    hatched = max(_bars(picture, "stroke: var(--wrong)"))
    assert right == pytest.approx(hatched, rel=1e-3)


def test_arms_differ_without_colour() -> None:
    looks = [drawing.line(index) for index in range(24)]
    assert len({(look["color"], look["linestyle"], look["marker"]) for look in looks}) == 24
    assert len({(look["linestyle"], look["marker"]) for look in looks[:6]}) == 6


def test_missing_parts_have_no_figure(arms: list[Evaluation]) -> None:
    plain = simulated.plain(arms[0])
    assert plots.shift_histogram(plain) is None
    assert plots.shift_histogram(plain, quantity="mutual information") is None
    assert plots.shift_histogram(arms[0], quantity="mutual information") is None  # a point has none


@pytest.mark.parametrize("rows", [1, 2, 25])
def test_few_rows_and_perfect_or_hopeless_arms_can_be_drawn(rows: int) -> None:
    for label in (0, 1):
        probs = np.tile([1.0, 0.0], (rows, 1))
        arm = Evaluation(
            "a", ["x", "y"], np.full(rows, label), probs, np.zeros(rows), ["t"] * rows, ood_probs=probs
        )
        for picture in (
            plots.reliability_diagram(arm),
            plots.confidence_histogram(arm),
            plots.shift_histogram(arm) or "",
            plots.risk_coverage_curves([arm]),
        ):
            assert picture.startswith("<svg")
            assert "nan" not in picture


def test_wilson_interval_matches_its_defining_equation() -> None:
    for share, count in ((0.0, 5), (0.3, 20), (1.0, 3), (0.97, 400)):
        for end in plots.wilson(share, count):
            # The ends are the proportions p at which |share - p| is z standard errors of p.
            assert (share - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / count, abs=1e-12)


def _bars(picture: str, style: str) -> list[float]:
    """Heights of the closed rectangles painted so, in the order they were drawn."""
    heights = []
    for element in ElementTree.fromstring(picture).iter("path"):
        path = element.get("d", "")
        if (
            style in element.get("style", "")
            and path.endswith("z")
            and path.count("L") == 3
            and "clip-path" in element.attrib
        ):
            heights.append(
                np.ptp([float(part.split()[1]) for part in re.split("[MLz]", path) if part.strip()])
            )
    return heights
