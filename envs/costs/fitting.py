"""Interpolation of measured grids, and errors on the points that a fit has not seen."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from servegym.envs.costs.profile import Curve, Error, Surface, extended

Interpolation = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def relative_error(predicted: np.ndarray, measured: np.ndarray) -> Error:
    """|predicted / measured - 1| in percent: median, 90th percentile, maximum."""
    if len(measured) == 0:
        return Error(shapes=0, median_percent=0.0, p90_percent=0.0, max_percent=0.0)
    percent = 100 * np.abs(np.asarray(predicted) / np.asarray(measured) - 1)
    median, p90, largest = (round(float(np.percentile(percent, q)), 2) for q in (50, 90, 100))
    return Error(shapes=len(percent), median_percent=median, p90_percent=p90, max_percent=largest)


def left_out(
    at: np.ndarray, us: np.ndarray, interpolate: Interpolation = extended, floor: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Predictions for every other inner point from the rest, and what was measured there, plus `floor`."""
    out = np.arange(1, len(at) - 1, 2)
    kept = np.setdiff1d(np.arange(len(at)), out)
    return interpolate(at[kept], us[kept], at[out]) + floor, us[out] + floor


def power_law(at: np.ndarray, us: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Interpolation in logarithms, exact for monomials; the power of the last segment beyond the end."""
    safe = np.maximum(us, 1e-3)
    return np.exp(extended(np.log(at), np.log(safe), np.log(np.asarray(x, dtype=float))))


def widened(at: np.ndarray, us: np.ndarray, end: int) -> tuple[np.ndarray, np.ndarray]:
    """The curve with a last point at `end`, on the line through its middle and its end.

    The last two measured points lie too close together for a slope that carries far.
    """
    if at[-1] >= end:
        return at, us
    half = extended(at, us, np.asarray(at[-1] / 2))
    slope = (us[-1] - half) / (at[-1] / 2)
    return np.append(at, end), np.append(us, us[-1] + slope * (end - at[-1]))


def between(at: np.ndarray, end: int) -> np.ndarray:
    """The points of `at`, one more between neighbours a third or more apart, and doublings up to `end`."""
    points = set(at.tolist())
    for low, high in pairwise(at):
        if low and high > 1.3 * low:
            points.add(round(float(np.sqrt(low * high))))
    last = int(at[-1])
    while last < end:
        points |= {round(last * 2**0.5), 2 * last}
        last *= 2
    return np.asarray(sorted(points))


def grid(rows: np.ndarray, columns: np.ndarray, us: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scattered points as (rows, columns, table); cells that were not measured follow the line of their row.

    Rows with fewer than two points are left out.
    """
    r, c = np.unique(rows), np.unique(columns)
    table = np.full((len(r), len(c)), np.nan)
    table[np.searchsorted(r, rows), np.searchsorted(c, columns)] = us
    known = ~np.isnan(table)
    use = known.sum(axis=1) > 1
    for i in np.flatnonzero(use):
        table[i] = extended(c[known[i]], table[i, known[i]], c)
    return r[use], c, table[use]


def as_curve(at: np.ndarray, us: np.ndarray) -> Curve:
    """A `Curve` with five significant digits."""
    return Curve(tuple(int(x) for x in at), rounded(us))


def as_surface(rows: np.ndarray, columns: np.ndarray, us: np.ndarray) -> Surface:
    """A `Surface` with five significant digits, zero at row 0, and the first column repeated at column 0."""
    rows, columns, us = np.asarray(rows), np.asarray(columns), np.asarray(us)
    if columns[0] > 0:
        columns, us = np.append(0, columns), np.column_stack([us[:, 0], us])
    if rows[0] > 0:
        rows, us = np.append(0, rows), np.vstack([np.zeros(len(columns)), us])
    return Surface(tuple(map(int, rows)), tuple(map(int, columns)), tuple(rounded(row) for row in us))


def rounded(us: np.ndarray) -> tuple[float, ...]:
    """Five significant digits, none below zero."""
    return tuple(float(f"{max(value, 0.0):.5g}") for value in us)
