"""Migration by the load of INFaaS++, which does not see the queue.

The load is that of the baseline of Llumnix (OSDI'24), alibaba/llm-scheduling-artifact,
`InstanceLoadInfo.compute_instance_load` without load control of prefills; INFaaS++ itself does not migrate.
Beside `migrate_llumnix` it shows what de-fragmentation for waiting requests is worth.

    F = (free - watermark) / n_run, infinite at n_run = 0        free = (1 - kv_usage) * capacity, tokens
    sources F < low, destinations F > high; the least F goes with the greatest
"""

from __future__ import annotations

from typing import ClassVar

from servegym.agents.heuristics._builtin import BuiltIn
from servegym.agents.heuristics._rule import number


class MigrateINFaaS(BuiltIn):
    """The pair of least and most free KV tokens per running request.

    Args:
        low: freeness below which an instance gives, tokens per request.
        high: freeness above which an instance takes, tokens per request.
        watermark: share of the KV cache that is kept free, in [0, 1].
    """

    name = "migrate_infaas"
    kinds = ("migrate",)
    rule = "infaas"
    search_space: ClassVar[dict[str, tuple]] = {
        "low": (16.0, 48.0, 160.0, 480.0),
        "high": (48.0, 160.0, 480.0, 1600.0),
        "watermark": (0.0, 0.01, 0.05),
    }

    def __init__(self, low: float = 48.0, high: float = 48.0, watermark: float = 0.01) -> None:
        self.low = number(self.name, "low", low)
        self.high = number(self.name, "high", high)
        self.watermark = number(self.name, "watermark", watermark, high=1.0)

    def params(self) -> tuple[float, ...]:
        """As the model takes them."""
        return (self.low, self.high, self.watermark)
