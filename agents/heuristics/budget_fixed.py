"""Prefill budget: one cap for all times.

Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve", OSDI'24: chunks of
512 tokens under a strict service level, 2,048 under a relaxed one.

    the largest cap up to `tokens`, else the smallest
"""

from __future__ import annotations

from typing import ClassVar

from servegym.agents.heuristics._builtin import BuiltIn
from servegym.agents.heuristics._rule import number


class BudgetFixed(BuiltIn):
    """The largest offered cap up to a number of tokens.

    Args:
        tokens: most prompt tokens of an iteration.
    """

    name = "budget_fixed"
    kinds = ("budget",)
    rule = "fixed"
    search_space: ClassVar[dict[str, tuple]] = {"tokens": (128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0)}

    def __init__(self, tokens: float = 512.0) -> None:
        self.tokens = number(self.name, "tokens", tokens)

    def params(self) -> tuple[float, ...]:
        """As the model takes them."""
        return (self.tokens,)
