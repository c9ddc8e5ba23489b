"""Dispatch of Llumnix: to the freest instance.

Sun et al., "Llumnix: Dynamic Scheduling for Large Language Model Serving", OSDI'24, algorithm 1, and its
artifact, alibaba/llm-scheduling-artifact, `InstanceLoadInfo.compute_instance_load_dispatch`.

    paper:     argmax_i (M - sum of virtual usage) / B
               running requests use what they hold, the head of the queue what it demands, others nothing
    artifact:  argmax_i (free - watermark - demand of all waiting) / (n_run + n_wait), infinite when idle
    both:      less M - urgent_load where requests above the lowest priority are in flight: the artifact's
               reserved blocks, and what the paper's headroom / number of them amounts to over all of them

A router sees neither the queue nor each request's memory. It knows the tokens that it has in flight, what
running requests hold (scraped) and so, by difference, the demand of those that wait; the head's demand is
their mean. Nor does an observation tell the workload's lowest priority: every request dispatches as a normal
one, where the artifact sends urgent ones to instances that have such already.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from servegym.agents.heuristics._builtin import BuiltIn
from servegym.agents.heuristics._rule import View, choice, load, number
from servegym.envs.cluster.rule_names import MODES


class DispatchLlumnix(BuiltIn):
    """Most free KV tokens per request.

    Args:
        mode: "paper" or "artifact".
        watermark: share of the KV cache that the artifact keeps free, in [0, 1].
        urgent_load: tokens of KV that an instance with urgent requests should hold at most.
    """

    name = "dispatch_llumnix"
    rule = "llumnix"
    search_space: ClassVar[dict[str, tuple]] = {
        "mode": MODES,
        "watermark": (0.0, 0.01, 0.05),
        "urgent_load": (1600.0, 6400.0, 25600.0),
    }

    def __init__(self, mode: str = "paper", watermark: float = 0.01, urgent_load: float = 1600.0) -> None:
        self.mode = choice(self.name, "mode", mode, MODES)
        self.watermark = number(self.name, "watermark", watermark, high=1.0)
        self.urgent_load = number(self.name, "urgent_load", urgent_load)

    def params(self) -> tuple[float, ...]:
        """As the model takes them."""
        return (MODES.index(self.mode), self.watermark, self.urgent_load)

    def cost(self, view: View) -> np.ndarray:
        """Load, [B, I]."""
        capacity, context = view.instance("kv_capacity_tokens"), view.instance("inflight_context_tokens")
        inflight = view.instance("inflight")
        spare = np.maximum(0.0, capacity - self.urgent_load)
        reserve = np.where(view.instance("urgent_inflight") > 0.0, spare, 0.0)
        if self.mode == "artifact":
            return load((1.0 - self.watermark) * capacity - context - reserve, inflight)
        running = np.minimum(view.instance("running"), inflight)
        held = np.minimum(view.instance("kv_usage") * capacity, context)
        head = (context - held) / np.maximum(inflight - running, 1.0)
        return load(capacity - held - head - reserve, running)
