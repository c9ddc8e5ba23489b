"""SGLang's cache-aware router.

sgl-project/sglang, `CacheAwareConfig` and policy `cache_aware_zmq` of the Rust router (0.5, 32, 1.1; the
command line's defaults are 0.3, 64, 1.5). Load is the router's count of requests in flight. Unmatched
prompts go to the least loaded worker: sending them to the smallest prefix tree, as earlier versions did,
buried workers that had just restarted (SGLang 14305, 14532).

    imbalanced = max_load - min_load > abs_threshold  and  max_load > rel_threshold * min_load
    not imbalanced and max_i match_i > match_threshold: the least loaded of the longest match
    otherwise:                                          argmin_i load_i
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from servegym.agents.heuristics._rule import Rule, View, number


class SGLangCacheAware(Rule):
    """The longest cached prefix while the load is balanced, else the least loaded instance.

    Args:
        abs_threshold: requests between the most and the least loaded instance that count as balanced.
        rel_threshold: ratio of the two that counts as balanced.
        match_threshold: share of the prompt that must be cached, in [0, 1].
    """

    name = "sglang_cache_aware"
    search_space: ClassVar[dict[str, tuple]] = {
        "abs_threshold": (4.0, 8.0, 16.0, 32.0, 64.0),
        "rel_threshold": (1.1, 1.5, 2.0),
        "match_threshold": (0.1, 0.3, 0.5, 0.8),
    }

    def __init__(
        self, abs_threshold: float = 32.0, rel_threshold: float = 1.1, match_threshold: float = 0.5
    ) -> None:
        self.abs_threshold = number(self.name, "abs_threshold", abs_threshold)
        self.rel_threshold = number(self.name, "rel_threshold", rel_threshold)
        self.match_threshold = number(self.name, "match_threshold", match_threshold, high=1.0)

    def cost(self, view: View) -> np.ndarray:
        """Requests in flight at the eligible instances and infinity elsewhere, [B, I]."""
        load, match = view.instance("inflight"), view.hit_fraction()
        least, most = view.min_max(load)
        imbalanced = (most - least > self.abs_threshold) & (most > self.rel_threshold * least)
        _, longest = view.min_max(match)
        cached = ~imbalanced & (longest > self.match_threshold)
        return np.where(cached & (match < longest), np.inf, load)
