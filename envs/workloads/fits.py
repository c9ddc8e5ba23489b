"""The fitted numbers that ship with the package, and the seeds and checks that all generators share."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

from servegym.errors import InputError

FITS = Path(__file__).with_name("data") / "fits.json"


@cache
def _document() -> dict[str, Any]:
    return json.loads(FITS.read_text(encoding="utf-8"))


def fit(trace: str) -> dict[str, Any]:
    """Everything fitted on one trace: source, license, class, arrival, lengths, session, goodness."""
    return _document()["traces"][trace]


def quantile_p() -> list[float]:
    """Probabilities of the quantile tables."""
    return _document()["quantile_p"]


def check_positive(where: str, field: str, value: float) -> float:
    """Return `value` as a float; refuse anything but a finite number above 0."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or value <= 0
    ):
        raise InputError(where, field, value, "must be a finite number above 0")
    return float(value)


def check_whole(where: str, field: str, value: int, least: int) -> int:
    """Return `value`; refuse anything but a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(where, field, value, f"must be a whole number of at least {least}")
    return value
