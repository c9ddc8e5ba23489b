"""Least predicted work: the instance with the fewest seconds of work, this request's included.

Least work left (Harchol-Balter, "Performance Modeling and Design of Computer Systems", 2013, chapter 24)
with predicted output lengths; this request's own work is added, so that on a mixed fleet an idle fast
instance comes before an idle slow one. Output tokens are worth seconds at the instance's decode speed for a
fixed batch: at the speed of the present batch, an instance would look faster the more requests it has.

    argmin_i  queue_s_i + prefill_s_i + (predicted_tokens_i + predicted_output) / decode_tokens_per_s_i
"""

from __future__ import annotations

import numpy as np

from servegym.agents.heuristics._builtin import BuiltIn
from servegym.agents.heuristics._rule import View


class LeastWorkPredicted(BuiltIn):
    """Fewest predicted seconds of work, this request's included."""

    name = "least_work_predicted"
    rule = "least_work"

    def cost(self, view: View) -> np.ndarray:
        """Seconds of work, [B, I]."""
        speed = np.maximum(view.instance("decode_tokens_per_s"), 1.0)  # 0 where the row is padding
        own = view.edge("prefill_s") + view.request("predicted_output_tokens") / speed
        return view.edge("queue_s") + view.instance("inflight_predicted_tokens") / speed + own
