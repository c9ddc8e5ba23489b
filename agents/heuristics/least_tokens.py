"""Least tokens: join the shortest queue, counted in tokens of context that the router has in flight.

SGLang, `python/sglang/srt/managers/data_parallel_controller.py`, load balance method `total_tokens`.

    argmin_i (prompt and streamed tokens in flight)_i
"""

from __future__ import annotations

import numpy as np

from servegym.agents.heuristics._builtin import BuiltIn
from servegym.agents.heuristics._rule import View


class LeastTokens(BuiltIn):
    """The instance with the fewest tokens in flight."""

    name = "least_tokens"
    rule = "least_tokens"

    def cost(self, view: View) -> np.ndarray:
        """Tokens in flight, [B, I]."""
        return view.instance("inflight_context_tokens")
