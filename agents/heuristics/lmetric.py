"""LMetric: multiply the prefill work by the batch size; no weights to tune.

Zhang et al., "LMetric: Simple is Better - Multiplication May Be All You Need for LLM Request Scheduling",
OSDI'26, arXiv 2603.15202. Its prefill term counts the prompts queued at the instance and the uncached
part of this one; 1 is added to the batch size so that idle instances still differ by their prefill work.

    argmin_i (queued_prefill_tokens_i + prompt - hit_i) * (requests_i + 1)
"""

from __future__ import annotations

import numpy as np

from servegym.agents.heuristics._builtin import BuiltIn
from servegym.agents.heuristics._rule import View


class LMetric(BuiltIn):
    """Least product of new prefill tokens and requests in flight."""

    name = "lmetric"
    rule = "lmetric"

    def cost(self, view: View) -> np.ndarray:
        """Product of prefill tokens and batch size with the request there, [B, I]."""
        new = view.request("prompt_tokens") - view.edge("prefix_hit_tokens")
        return (view.instance("inflight_prefill_tokens") + new) * (view.instance("inflight") + 1.0)
