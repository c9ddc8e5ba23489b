"""NVIDIA Dynamo's KV router at temperature 0.

ai-dynamo/dynamo, `lib/kv-router/src/scheduling/selector.rs`, `DefaultWorkerSelector` (overlap score
weight 1.0 by default). Both terms are what the instance would hold with this request, prefill less the
cached prefix; the block size divides both and cancels, so tokens do. Dynamo breaks ties by the size of
its prefix tree and then at random; the tree is not observable here, so ties go at random.

    argmin_i  w * (queued_prefill_tokens_i + prompt - hit_i) + (context_tokens_i + prompt)
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from servegym.agents.heuristics._rule import Rule, View, number


class Dynamo(Rule):
    """Least weighted sum of prefill and decode load.

    Args:
        overlap_weight: w, weight of the prefill term; 0 ignores the cache.
    """

    name = "dynamo"
    random_ties = True
    search_space: ClassVar[dict[str, tuple]] = {"overlap_weight": (0.25, 0.5, 1.0, 2.0, 4.0)}

    def __init__(self, overlap_weight: float = 1.0) -> None:
        self.overlap_weight = number(self.name, "overlap_weight", overlap_weight)

    def cost(self, view: View) -> np.ndarray:
        """Prefill and decode tokens with this request, [B, I]."""
        prompt = view.request("prompt_tokens")
        prefill = view.instance("inflight_prefill_tokens") + prompt - view.edge("prefix_hit_tokens")
        decode = view.instance("inflight_context_tokens") + prompt
        return self.overlap_weight * prefill + decode
