"""Least work left with the true remaining work of every instance, which no deployment knows.

As `least_work_predicted`, with the simulator's word for the work that is left: the gap between the two is
what better predictions could give.

    argmin_i  true_seconds_left_i + prefill_s_i + predicted_output / decode_tokens_per_s_i
"""

from __future__ import annotations

import numpy as np

from servegym.agents.heuristics._rule import Rule, View
from servegym.agents.heuristics.least_work_predicted import own_work_s


class LeastWorkOracle(Rule):
    """Fewest true seconds of work left, with this request's predicted work."""

    name = "least_work_oracle"
    needs_oracle = True

    def cost(self, view: View) -> np.ndarray:
        """Seconds of work, [B, I]."""
        return view.oracle(self.name) + own_work_s(view)
