"""Victim: the request that holds most KV, so that as few as possible give way.

As SIZE in web caches (Williams et al., "Removal Policies in Network Caches for World-Wide Web Documents",
SIGCOMM 1996).

    argmax_r kv_tokens_r;  then argmin prefill_s + copy_s
"""

from __future__ import annotations

from servegym.agents.heuristics._builtin import BuiltIn


class VictimLargest(BuiltIn):
    """Most KV."""

    name = "victim_largest"
    kinds = ("preempt",)
    rule = "largest"
