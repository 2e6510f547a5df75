"""The lowest point of a function of one number: on a grid, within its best cell, and of a parabola."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from scipy.optimize import minimize_scalar


def lowest(loss: Callable[[float], float], grid: Sequence[float], tolerance: float = 1e-6) -> float:
    """Where the loss is lowest: the best point of an increasing grid, refined as :func:`refined` does.

    A loss with several valleys is well served where the grid sees each of them.
    """
    return refined(loss, grid, min(range(len(grid)), key=lambda i: loss(grid[i])), tolerance)


def refined(loss: Callable[[float], float], grid: Sequence[float], at: int, tolerance: float = 1e-6) -> float:
    """Brent's method between the neighbours of ``grid[at]``; never a point that is worse than this one.

    Args:
        tolerance: in the loss's argument, absolute.
    """
    bounds = (grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)])
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": tolerance})
    return min(grid[at], float(found.x), key=loss)


def between(xs: Sequence[float], x: float) -> list[float]:
    """Lagrange's weights w with f(x) = sum_i w_i f(xs_i) for every polynomial of degree below ``len(xs)``."""
    return [math.prod((x - b) / (a - b) for b in xs if b != a) for a in xs]


def vertex(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """The minimum of the parabola through the lowest of some evenly spaced points and its neighbours.

    At an end it is that point.
    """
    at = min(range(len(ys)), key=ys.__getitem__)
    if not 0 < at < len(ys) - 1:
        return xs[at], ys[at]
    before, here, after = ys[at - 1 : at + 2]
    slope, bend = after - before, after - 2 * here + before
    if bend <= 0:
        return xs[at], here
    x = xs[at] - 0.5 * slope / bend * (xs[at + 1] - xs[at])
    return x, here - slope**2 / (8 * bend)
