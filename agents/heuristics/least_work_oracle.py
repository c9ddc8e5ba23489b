"""Least work left with the true remaining work of every instance, which no deployment knows.

As `least_work_predicted`, with the simulator's word for the work that is left: the gap between the two is
what better predictions could give.

    argmin_i  true_seconds_left_i + prefill_s_i + predicted_output / decode_tokens_per_s_i
"""

from __future__ import annotations

import numpy as np

from servegym.agents.heuristics._rule import Rule, View


class LeastWorkOracle(Rule):
    """Fewest true seconds of work left, with this request's predicted work."""

    name = "least_work_oracle"
    needs_oracle = True

    def cost(self, view: View) -> np.ndarray:
        """Seconds of work, [B, I]."""
        decode_speed = np.maximum(view.instance("decode_tokens_per_s"), 1.0)  # 0 where the row is padding
        own = view.edge("prefill_s") + view.request("predicted_output_tokens") / decode_speed
        return view.oracle(self.name) + own
