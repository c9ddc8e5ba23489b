"""Victim: the request whose return costs least for the memory that it frees.

The criterion of GreedyDual-Size (Cao and Irani, "Cost-Aware WWW Proxy Caching Algorithms", USITS 1997), least
cost for its size, without ageing: a victim comes back by itself. The cost is that of the cheaper way, as
InferCept chooses between discarding and swapping (Abhyankar et al., ICML 2024, arXiv 2402.01869). Blocks are
of one size on an instance, so tokens stand for them.

    argmin_{r, recompute or swap} (prefill_s + copy_s) / kv_tokens_r
"""

from __future__ import annotations

from servegym.agents.heuristics._builtin import BuiltIn


class VictimCostAware(BuiltIn):
    """Least cost of coming back for each KV token."""

    name = "victim_cost_aware"
    kinds = ("preempt",)
    rule = "cheapest"
