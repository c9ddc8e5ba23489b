"""INFaaS++: free memory per running request, blind to the queue.

The baseline of Llumnix (OSDI'24); alibaba/llm-scheduling-artifact,
`InstanceLoadInfo.compute_instance_load`, metric `consumed_speed` without load control of prefills. An
instance without running requests has load minus infinity. Memory and batch size are as last scraped, as an
instance reports them; the watermark is vLLM's 1% of the blocks.

    argmin_i  -(free_i - watermark_i) / n_run_i        free = (1 - kv_usage) * capacity, tokens
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from servegym.agents.heuristics._builtin import BuiltIn
from servegym.agents.heuristics._rule import View, load, number


class INFaaS(BuiltIn):
    """Most free KV tokens per running request.

    Args:
        watermark: share of the KV cache that is kept free, in [0, 1].
    """

    name = rule = "infaas"
    search_space: ClassVar[dict[str, tuple]] = {"watermark": (0.0, 0.01, 0.05, 0.1)}

    def __init__(self, watermark: float = 0.01) -> None:
        self.watermark = number(self.name, "watermark", watermark, high=1.0)

    def params(self) -> tuple[float, ...]:
        """As the model takes them."""
        return (self.watermark,)

    def cost(self, view: View) -> np.ndarray:
        """Load by what instances report of themselves, [B, I]."""
        free = (1.0 - self.watermark - view.instance("kv_usage")) * view.instance("kv_capacity_tokens")
        return load(free, view.instance("running"))
