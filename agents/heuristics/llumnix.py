"""Llumnix: dispatch to the freest instance.

Sun et al., "Llumnix: Dynamic Scheduling for Large Language Model Serving", OSDI'24, algorithm 1, and its
artifact, alibaba/llm-scheduling-artifact, `InstanceLoadInfo.compute_instance_load_dispatch`.

    paper:     argmax_i (M - sum of virtual usage) / B
               running requests use what they hold, the head of the queue what it demands, others nothing
    artifact:  argmax_i (free - watermark - demand of all waiting) / (n_run + n_wait), infinite when idle

A router sees neither the queue nor each request's memory. It knows the tokens that it has in flight, what
running requests hold (scraped) and so, by difference, the demand of those that wait; the head's demand is
their mean. Headroom and reserved blocks of high-priority requests need a count by priority at each
instance, which the observation does not carry: all requests dispatch as normal ones.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from servegym.agents.heuristics._rule import Rule, View, number
from servegym.errors import InputError


class Llumnix(Rule):
    """Most free KV tokens per request.

    Args:
        mode: "paper" or "artifact".
        watermark: share of the KV cache that the artifact keeps free, in [0, 1].
    """

    name = "llumnix"
    search_space: ClassVar[dict[str, tuple]] = {
        "mode": ("paper", "artifact"),
        "watermark": (0.0, 0.01, 0.05),
    }

    def __init__(self, mode: str = "paper", watermark: float = 0.01) -> None:
        if mode not in ("paper", "artifact"):
            raise InputError(self.name, "mode", mode, "choose paper or artifact")
        self.mode = mode
        self.watermark = number(self.name, "watermark", watermark, high=1.0)

    def cost(self, view: View) -> np.ndarray:
        """Negated freeness, [B, I]."""
        capacity = view.instance("kv_capacity_tokens")
        context, inflight = view.instance("inflight_context_tokens"), view.instance("inflight")
        if self.mode == "artifact":
            # In flight is running or waiting, so what is left is free without the demand of all waiting.
            return _per_request((1.0 - self.watermark) * capacity - context, inflight)
        running = np.minimum(view.instance("running"), inflight)
        held = np.minimum(view.instance("kv_usage") * capacity, context)
        head = (context - held) / np.maximum(inflight - running, 1.0)
        return _per_request(capacity - held - head, running)


def _per_request(free: np.ndarray, requests: np.ndarray) -> np.ndarray:
    return np.where(requests > 0, -free / np.maximum(requests, 1.0), -np.inf)
