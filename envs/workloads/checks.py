"""Checks of arguments and of rows; errors name the file, the field or column and row, and the value."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import NoReturn

import numpy as np

from servegym.errors import InputError

MAX_TOKENS = 2_000_000  # beyond any context window in use; larger values are units gone wrong
MAX_SECONDS = 8e6  # three months; the cluster's clock is int64 picoseconds and ends at 9.2e6 s


def refuse(name: str, column: str, values: np.ndarray, row: int, hint: str) -> NoReturn:
    """Raise the InputError of one row."""
    raise InputError(name, f"{column}, row {row}", values[row].item(), hint)


def check_rows(name: str, column: str, values: np.ndarray, bad: np.ndarray, hint: str) -> None:
    """Refuse the first row where `bad` is true, both [N]."""
    rows = np.flatnonzero(bad)
    if rows.size:
        refuse(name, column, values, int(rows[0]), hint)


def check_whole_numbers(name: str, column: str, values: np.ndarray, dtype: type) -> np.ndarray:
    """`values` as an integer array of `dtype`; refuses fractions, NaN and what does not fit."""
    limits = np.iinfo(dtype)
    bad = ~((values >= limits.min) & (values <= limits.max) & (values == np.floor(values)))
    check_rows(name, column, values, bad, f"must be a whole number in {limits.min}..{limits.max}")
    return np.ascontiguousarray(values, dtype)


def check_tokens(name: str, column: str, values: np.ndarray, least: int = 1) -> np.ndarray:
    """Token counts [N] as int32; refuses anything but whole numbers in least..MAX_TOKENS."""
    bad = ~((values >= least) & (values <= MAX_TOKENS) & (values == np.floor(values)))
    hint = f"token counts are whole numbers in {least}..{MAX_TOKENS}; drop or mend the row"
    check_rows(name, column, values, bad, hint)
    return np.ascontiguousarray(values, np.int32)


def check_seconds(name: str, column: str, values: np.ndarray) -> None:
    """Refuse seconds [N] that are negative, not finite or beyond the clock."""
    hint = f"seconds lie in 0..{MAX_SECONDS:.0f}; check the unit, or cut a window"
    check_rows(name, column, values, ~((values >= 0) & (values <= MAX_SECONDS)), hint)


def check_sorted(name: str, column: str, seconds: np.ndarray) -> None:
    """Refuse the first row [N] that lies before the one above it."""
    back = np.append(False, np.diff(seconds) < 0)
    check_rows(name, column, seconds, back, "rows are sorted by arrival; sort the file")


def check_positive(where: str, field: str, value: float) -> float:
    """Return `value` as a float; refuse anything but a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value <= 0:
        raise InputError(where, field, value, "must be a finite number above 0")
    return float(value)


def check_whole(where: str, field: str, value: int, least: int) -> int:
    """Return `value`; refuse anything but a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise InputError(where, field, value, f"must be a whole number of at least {least}")
    return int(value)


def check_at_least_zero(where: str, field: str, value: float) -> float:
    """Return `value` as a float; refuse anything but a finite number of at least 0."""
    return 0.0 if value == 0 else check_positive(where, field, value)
