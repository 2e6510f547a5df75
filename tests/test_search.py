"""Minima of functions whose minima are known."""

from __future__ import annotations

import math

import pytest

from kilobayes.search import between, lowest, refined, vertex

GRID = [cell / 2 for cell in range(-8, 9)]


@pytest.mark.parametrize("at", [-3.21, -0.5, 0.0, 1.234, 3.99])
def test_the_lowest_point_of_a_valley(at: float) -> None:
    assert lowest(lambda x: math.cosh(x - at), GRID) == pytest.approx(at, abs=1e-5)
    assert lowest(lambda x: abs(x - at), GRID) == pytest.approx(at, abs=1e-5)


def test_at_the_ends_it_is_the_end() -> None:
    assert lowest(lambda x: x, GRID) == -4.0
    assert lowest(lambda x: -x, GRID) == 4.0
    assert lowest(lambda x: 1.0, GRID) == -4.0


def test_the_deeper_of_two_valleys() -> None:
    """min(x^2, (x - 3)^2 / 2 - 1): a search without a grid may end in either."""
    assert lowest(lambda x: min(x**2, (x - 3) ** 2 / 2 - 1), GRID) == pytest.approx(3.0, abs=1e-5)


def test_never_worse_than_the_point_refined() -> None:
    """Brent's method ends elsewhere where the loss has a narrow well at the point of the grid."""

    def well(x: float) -> float:
        return -1.0 if x == 1.0 else (x - 0.7) ** 2

    assert refined(well, GRID, GRID.index(1.0)) == 1.0


@pytest.mark.parametrize("xs", [[0.0, 1.0, 2.0], [1.0, 2.0, 4.0], [-1.0, 0.5, 0.75, 3.0]])
def test_weights_between_points_are_exact_for_polynomials(xs: list[float]) -> None:
    for x in (-2.0, 0.3, 1.0, 5.0):
        weights = between(xs, x)
        for degree in range(len(xs)):
            found = sum(w * a**degree for w, a in zip(weights, xs, strict=True))
            assert found == pytest.approx(x**degree, rel=1e-9, abs=1e-9)
    assert between(xs, xs[1]) == [float(i == 1) for i in range(len(xs))]


def test_vertex_of_a_parabola() -> None:
    xs = [0.5 * i for i in range(9)]
    assert vertex(xs, [3.0 * (x - 1.3) ** 2 - 7.0 for x in xs]) == pytest.approx((1.3, -7.0))
    assert vertex(xs, [-x for x in xs]) == (4.0, -4.0)
    assert vertex(xs, [1.0] * 9) == (0.0, 1.0)
