"""How many prompt tokens an iteration may carry, as the policy says: the `budget` question inside vLLM.

As in the model of a cluster, the policy is asked once a period, and only while some requests decode and
others have prompt to compute. What it answers holds until the next answer: prompts get so many tokens of an
iteration, beside one for each request that decodes. Reads nothing but attributes, so that it needs no vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from servegym.runtime.decider import Decider
from servegym.runtime.questions import Cap, ask_budget
from servegym.runtime.view import ClusterView, InstanceView
from servegym.runtime.vllm.engine_view import EngineView


class PrefillCap:
    """The cap, asked for when it is time to.

    Args:
        engine: whose view holds the cap.
        decider: of any policy; one that does not answer `budget` is not asked.
        most: tokens of an iteration, as vLLM was started.
        period_s: between two questions; 0: never ask.

    Attributes:
        asked: questions so far.
    """

    def __init__(self, engine: EngineView, decider: Decider, most: int, period_s: float) -> None:
        self._engine, self._decider, self._most = engine, decider, most
        self._instance = engine.view.instances[0]
        self._period_s, self._next_s = period_s, period_s or math.inf
        self.asked = 0

    def renew(self, look: Callable[[], ClusterView]) -> None:
        """Ask for the cap, when it is time to.

        Args:
            look: gives the engine's view with the requests that run and wait now.
        """
        now = self._engine.now()
        if now < self._next_s:
            return
        self._next_s = now + self._period_s
        if "budget" not in self._decider.policy.kinds:
            return
        view = look()
        if _has_mixed_work(self._instance):
            self.asked += 1
            action = self._decider.decide(ask_budget(view, 0))
            if isinstance(action, Cap):
                self._instance.prefill_cap = action.tokens

    def tokens(self, running: Iterable[Any]) -> int:
        """Tokens of the next iteration in which these requests of vLLM's run."""
        cap = self._instance.prefill_cap
        if cap >= self._most:
            return self._most
        return min(self._most, cap + sum(not request.is_prefill_chunk for request in running))


def _has_mixed_work(instance: InstanceView) -> bool:
    """Whether decodes and prompts share iterations."""
    running = instance.running
    has_prompt = instance.waiting or any(not r.decoding and r.kv_tokens < r.goal_tokens for r in running)
    return bool(has_prompt) and any(r.decoding for r in running)
