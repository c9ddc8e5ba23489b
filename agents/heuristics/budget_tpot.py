"""Prefill budget: the most prompt tokens for which an iteration still meets the time per output token.

Sarathi-Serve (OSDI'24) sets its token budget by profiling so, once for all batches; here the profile is asked
for the batch that runs, as HyGen's latency predictor is (arXiv 2501.14808).

    the largest cap with iteration_s(running decodes, cap) <= factor * slo_tpot_s, else the smallest

The service level is that of the prompt that is next; an observation has no other.
"""

from __future__ import annotations

from typing import ClassVar

from servegym.agents.heuristics._builtin import BuiltIn
from servegym.agents.heuristics._rule import number


class BudgetTPOT(BuiltIn):
    """The largest cap whose iteration is short enough.

    Args:
        factor: iteration time allowed, in TPOT service levels; above 1, as not every iteration prefills.
    """

    name = "budget_tpot"
    kinds = ("budget",)
    rule = "tpot"
    search_space: ClassVar[dict[str, tuple]] = {"factor": (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)}

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = number(self.name, "factor", factor)

    def params(self) -> tuple[float, ...]:
        """As the model takes them."""
        return (self.factor,)
