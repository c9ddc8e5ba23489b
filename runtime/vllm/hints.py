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
        hint = hints.get("predicted_tokens")
        if _is_number(hint) and hint >= 1:
            guess = float(hint)
        else:
            guess = self._mean if self._mean is not None else float(most or MEMORY)
        return max(1, int(min(guess, most or guess)))


def service_level(hints: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `RequestView` that a client asks for; what makes no sense is left out."""
    return {name: float(hints[name]) for name in LEVELS if _is_number(hints.get(name)) and hints[name] > 0}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e6
