"""Relative errors on shapes that a profile was not built from."""

from __future__ import annotations

import numpy as np

from servegym.envs.costs.profile import Error


def relative_error(predicted: np.ndarray, measured: np.ndarray) -> Error:
    """|predicted / measured - 1| in percent: median, 90th percentile, maximum."""
    if len(measured) == 0:
        return Error(shapes=0, median_percent=0.0, p90_percent=0.0, max_percent=0.0)
    percent = 100 * np.abs(np.asarray(predicted) / np.asarray(measured) - 1)
    median, p90, largest = (round(float(np.percentile(percent, q)), 2) for q in (50, 90, 100))
    return Error(shapes=len(percent), median_percent=median, p90_percent=p90, max_percent=largest)
