"""How long an answer will be, where the client does not say: as long as those before it were."""

from __future__ import annotations

MEMORY = 64  # answers


class OutputLengths:
    """An exponential mean over the answers that ended.

    Clients that know better say so in `vllm_xargs`: {"predicted_tokens": 120}.
    """

    def __init__(self) -> None:
        self._mean: float | None = None

    def add(self, tokens: int) -> None:
        """An answer of so many tokens has ended."""
        self._mean = tokens if self._mean is None else self._mean + (tokens - self._mean) / MEMORY

    def predict(self, hint: object, most: int | None) -> int:
        """Tokens, at least 1, of an answer that may have `most`; `hint` is what the client says."""
        if isinstance(hint, int | float) and not isinstance(hint, bool) and hint >= 1:
            guess = float(hint)
        else:
            guess = self._mean if self._mean is not None else float(most or MEMORY)
        return max(1, int(min(guess, most or guess)))
