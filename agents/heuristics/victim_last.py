"""Victim: the request that was admitted last.

vLLM v1, `vllm/v1/core/sched/scheduler.py`, queue policy `fcfs`: out of memory pops the last of the running
list. The engine recomputes it; here it is swapped where that is possible and cheaper.

    argmax_r admission_r, the first row of the question;  then argmin prefill_s + copy_s
"""

from __future__ import annotations

from servegym.agents.heuristics._builtin import BuiltIn


class VictimLast(BuiltIn):
    """The newest admission."""

    name = "victim_last"
    kinds = ("preempt",)
    rule = "last"
