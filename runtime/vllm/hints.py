"""What clients say about their requests in `vllm_xargs`, and what is assumed where they say nothing.

{"predicted_tokens": 120, "slo_ttft_s": 1.0, "slo_tpot_s": 0.05, "weight": 1.0}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MEMORY = 64  # answers
LEVELS = ("slo_ttft_s", "slo_tpot_s", "weight")


class OutputLengths:
    """Predicts that an answer will be as long as those before it were: their exponential mean."""

    def __init__(self) -> None:
        self._mean: float | None = None

    def add(self, tokens: int) -> None:
        """An answer of so many tokens has ended."""
        self._mean = tokens if self._mean is None else self._mean + (tokens - self._mean) / MEMORY

    def predict(self, hints: Mapping[str, Any], most: int | None) -> int:
        """Tokens, at least 1, of an answer that may have `most`."""
        guess = _number(hints.get("predicted_tokens"))
        if guess is None:
            guess = self._mean if self._mean is not None else float(most or MEMORY)
        return max(1, int(min(guess, most or guess)))


def service_level(hints: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `RequestView` that a client asks for; what makes no sense is left out."""
    values = {name: _number(hints.get(name)) for name in LEVELS}
    return {name: value for name, value in values.items() if value is not None}


def _number(value: Any) -> float | None:
    """A positive number, or None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and 0 < value < 1e6 else None
