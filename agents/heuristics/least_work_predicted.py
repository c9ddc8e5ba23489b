"""Least predicted work: the instance with the fewest seconds of work, this request's included.

Least work left (Harchol-Balter, "Performance Modeling and Design of Computer Systems", 2013, chapter 24)
with predicted output lengths; this request's own work is added, so that on a mixed fleet an idle fast
instance comes before an idle slow one. Output tokens are worth seconds at the instance's decode speed for a
fixed batch: at the speed of the present batch, an instance would look faster the more requests it has.

    argmin_i  queue_s_i + prefill_s_i + (predicted_tokens_i + predicted_output) / decode_tokens_per_s_i
"""

from __future__ import annotations

import numpy as np

from servegym.agents.heuristics._rule import Rule, View


class LeastWorkPredicted(Rule):
    """Fewest predicted seconds of work, this request's included."""

    name = "least_work_predicted"

    def cost(self, view: View) -> np.ndarray:
        """Predicted seconds of work, [B, I]."""
        left = view.instance("inflight_predicted_tokens") / decode_speed(view)
        return view.edge("queue_s") + left + own_work_s(view)


def decode_speed(view: View) -> np.ndarray:
    """Decode tokens/s of each instance, [B, I]; 1 where the row is padding."""
    return np.maximum(view.instance("decode_tokens_per_s"), 1.0)


def own_work_s(view: View) -> np.ndarray:
    """Predicted seconds of work that this request adds to each instance, [B, I]."""
    return view.edge("prefill_s") + view.request("predicted_output_tokens") / decode_speed(view)
