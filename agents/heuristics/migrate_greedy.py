"""Greedy migration: the pair that lets the request that goes finish earliest by the most seconds.

A control for threshold rules, in the manner of dispatch by predicted latency (Mooncake's Conductor, FAST'25).
It knows the speed of both instances, so it also moves requests of a mixed fleet to faster ones, and it counts
the copy; it does not see what the move does to others. A draining source comes first, whatever is won.

    stay  = left * source_step_s                       + [waits] * source_queue_s
    go    = left * step_after_s + copy_s + prefill_s   + [waits] * queue_s
    argmax stay - go, if above least_gain_s            left = predicted output still to come
"""

from __future__ import annotations

from typing import ClassVar

from servegym.agents.heuristics._builtin import BuiltIn
from servegym.agents.heuristics._rule import number


class MigrateGreedy(BuiltIn):
    """Most predicted seconds won for the request that goes.

    Args:
        least_gain_s: seconds that a migration must win.
    """

    name = "migrate_greedy"
    kinds = ("migrate",)
    rule = "greedy"
    search_space: ClassVar[dict[str, tuple]] = {"least_gain_s": (0.0, 0.1, 0.5, 1.0, 2.0, 5.0)}

    def __init__(self, least_gain_s: float = 0.5) -> None:
        self.least_gain_s = number(self.name, "least_gain_s", least_gain_s)

    def params(self) -> tuple[float, ...]:
        """As the model takes them."""
        return (self.least_gain_s,)
