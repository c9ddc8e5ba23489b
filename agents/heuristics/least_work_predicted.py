"""Least predicted work: the instance with the fewest seconds of work, this request's included.

Least work left (Harchol-Balter, "Performance Modeling and Design of Computer Systems", 2013, chapter 24)
with predicted output lengths; this request's own work is added, so that on a mixed fleet an idle fast
instance comes before an idle slow one. Output tokens are worth seconds at the instance's decode speed for a
fixed batch: at the speed of the present batch, an instance would look faster the more requests it has.

    argmin_i  queue_s_i + prefill_s_i + (predicted_tokens_i + predicted_output) / decode_tokens_per_s_i
"""

from __future__ import annotations

from servegym.agents.heuristics._rule import BuiltIn


class LeastWorkPredicted(BuiltIn):
    """Fewest predicted seconds of work, this request's included."""

    name = "least_work_predicted"
    rule = "least_work"
