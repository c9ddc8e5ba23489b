"""Victim: the least urgent request, of these the one that arrived last.

vLLM v1, `vllm/v1/core/sched/scheduler.py`, queue policy `priority`.

    argmax_r (priority_r, arrival_r);  then argmin prefill_s + copy_s
"""

from __future__ import annotations

from servegym.agents.heuristics._builtin import BuiltIn


class VictimLowestPriority(BuiltIn):
    """The lowest priority, then the latest arrival."""

    name = "victim_lowest_priority"
    kinds = ("preempt",)
    rule = "lowest_priority"
