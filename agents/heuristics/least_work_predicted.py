"""Least predicted work: the instance that would be done first with all that it has and this request.

Least work left (Harchol-Balter, "Performance Modeling and Design of Computer Systems", 2013, chapter 24)
with predicted output lengths; this request's own work is added, so that on a mixed fleet an idle fast
instance comes before an idle slow one. A decode step yields one token for each request in flight.

    argmin_i  queue_s_i + predicted_tokens_i * step_s_i / n_i
              + prefill_s_i + predicted_output * step_after_s_i / (n_i + 1)
"""

from __future__ import annotations

import numpy as np

from servegym.agents.heuristics._rule import Rule, View


class LeastWorkPredicted(Rule):
    """Fewest predicted seconds of work, this request's included."""

    name = "least_work_predicted"

    def cost(self, view: View) -> np.ndarray:
        """Predicted seconds until the instance is idle, [B, I]."""
        step = view.instance("decode_step_s") / np.maximum(view.instance("inflight"), 1.0)
        left = view.edge("queue_s") + view.instance("inflight_predicted_tokens") * step
        return left + own_work_s(view)


def own_work_s(view: View) -> np.ndarray:
    """Predicted seconds of work that this request adds to each instance, [B, I]."""
    step = view.edge("step_after_s") / (view.instance("inflight") + 1.0)
    return view.edge("prefill_s") + view.request("predicted_output_tokens") * step
