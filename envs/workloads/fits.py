"""The fitted numbers that ship with the package."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

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
