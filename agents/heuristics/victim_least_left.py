"""Victim by predicted output left: those with the least left are kept.

Shortest remaining processing time (Schrage, "A proof of the optimality of the shortest remaining processing
time discipline", Operations Research 16, 1968): what is nearly done soon frees its memory anyway, so the one
with the most left gives way, as in ALISE (ICCAD'24), whose longest waits go to host memory.

    argmax_r predicted_left_tokens_r;  then argmin prefill_s + copy_s
"""

from __future__ import annotations

from typing import ClassVar

from servegym.agents.heuristics._builtin import BuiltIn
from servegym.agents.heuristics._rule import choice

_VICTIMS = ("most", "least")


class VictimLeastLeft(BuiltIn):
    """Most predicted output left.

    Args:
        victim: "most", or "least" to turn the order round: a short rest waits for the memory of long ones.
    """

    name = "victim_least_left"
    kinds = ("preempt",)
    rule = "least_left"
    search_space: ClassVar[dict[str, tuple]] = {"victim": _VICTIMS}

    def __init__(self, victim: str = "most") -> None:
        self.victim = choice(self.name, "victim", victim, _VICTIMS)

    def params(self) -> tuple[float, ...]:
        """As the model takes them."""
        return (_VICTIMS.index(self.victim),)
