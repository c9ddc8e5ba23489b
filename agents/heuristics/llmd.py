"""llm-d and the Gateway API inference extension: weighted scorers and the max-score picker.

kubernetes-sigs/gateway-api-inference-extension (commit 02308be),
`pkg/epp/scheduling/framework/plugins`: `queue-scorer` (weight 2), `kv-cache-utilization-scorer` (2),
`prefix-cache-scorer` (3), `max-score-picker`, which shuffles before it sorts, so ties go at random. Queue
and KV usage are as last scraped; nothing is added between scrapes, as in the original.

    queue_i = (max waiting - waiting_i) / (max waiting - min waiting), the same for all where all are equal
    argmax_i  w_q * queue_i + w_kv * (1 - kv_usage_i) + w_p * hit_i / prompt
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from servegym.agents.heuristics._rule import Rule, View, number


class LLMD(Rule):
    """Highest weighted sum of queue, KV cache and prefix scores, each in [0, 1].

    Args:
        queue_weight: w_q. kv_weight: w_kv. prefix_weight: w_p.
    """

    name = "llmd"
    random_ties = True
    search_space: ClassVar[dict[str, tuple]] = {
        "queue_weight": (0.0, 1.0, 2.0, 4.0),
        "kv_weight": (0.0, 1.0, 2.0, 4.0),
        "prefix_weight": (1.0, 2.0, 3.0, 6.0),
    }

    def __init__(self, queue_weight: float = 2.0, kv_weight: float = 2.0, prefix_weight: float = 3.0) -> None:
        self.queue_weight = number(self.name, "queue_weight", queue_weight)
        self.kv_weight = number(self.name, "kv_weight", kv_weight)
        self.prefix_weight = number(self.name, "prefix_weight", prefix_weight)

    def cost(self, view: View) -> np.ndarray:
        """The weighted sum of scores, negated, [B, I]."""
        waiting = view.instance("waiting")
        least, most = view.min_max(waiting)
        queue = (most - waiting) / np.where(most > least, most - least, 1.0)
        return -(
            self.queue_weight * queue
            + self.kv_weight * (1.0 - view.instance("kv_usage"))
            + self.prefix_weight * view.hit_fraction()
        )
