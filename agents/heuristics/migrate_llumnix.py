"""Migration of Llumnix: from the instance that runs out of memory first to the freest one.

Sun et al., "Llumnix: Dynamic Scheduling for Large Language Model Serving", OSDI'24, algorithm 1, and its
artifact, alibaba/llm-scheduling-artifact: `InstanceLoadInfo.compute_instance_load` with load control of
prefills, pairing `defrag`. F is the freeness, in tokens for each request: about the decode steps left.

    paper:     F = (M - sum of virtual usage) / B, as for dispatch; a draining instance has -infinity
    artifact:  F = (free - watermark - demand of all waiting) / (n_run + [any waiting])
    both:      less M - urgent_load over the same divisor where urgent requests are in flight
    sources F < low, destinations F > high; the least F goes with the greatest

In artifact mode an instance that has preempted requests is a source and no destination; here, one whose
count of preemptions rose between the last two scrapes. The artifact has one threshold, 3 blocks of 16 tokens
(10 blocks for its traces 256-256 and 128-512); the paper does not print its two.
"""

from __future__ import annotations

from typing import ClassVar

from servegym.agents.heuristics._builtin import BuiltIn
from servegym.agents.heuristics._rule import choice, number
from servegym.envs.cluster.rule_names import MODES


class MigrateLlumnix(BuiltIn):
    """The pair of least and most free KV tokens per request.

    Args:
        mode: "paper" or "artifact".
        low: freeness below which an instance gives, tokens per request.
        high: freeness above which an instance takes, tokens per request.
        urgent_load: tokens of KV that an instance with urgent requests should hold at most.
    """

    name = "migrate_llumnix"
    kinds = ("migrate",)
    rule = "llumnix"
    search_space: ClassVar[dict[str, tuple]] = {
        "mode": MODES,
        "low": (16.0, 48.0, 160.0, 480.0),
        "high": (48.0, 160.0, 480.0, 1600.0),
        "urgent_load": (1600.0, 6400.0, 25600.0),
    }

    def __init__(
        self, mode: str = "paper", low: float = 48.0, high: float = 48.0, urgent_load: float = 1600.0
    ) -> None:
        self.mode = choice(self.name, "mode", mode, MODES)
        self.low = number(self.name, "low", low)
        self.high = number(self.name, "high", high)
        self.urgent_load = number(self.name, "urgent_load", urgent_load)

    def params(self) -> tuple[float, ...]:
        """As the model takes them."""
        return (MODES.index(self.mode), self.low, self.high, self.urgent_load)
