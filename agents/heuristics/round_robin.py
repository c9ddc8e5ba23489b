"""Round robin: each request to the instance after the last one's; `round_robin` of SGLang's data-parallel
controller and ROUND_ROBIN of Envoy.

    i = the first legal instance in cyclic order from next;  next = i + 1
"""

from __future__ import annotations

import numpy as np

from servegym.agents.heuristics._rule import Rule, View
from servegym.agents.policy import Observation


class RoundRobin(Rule):
    """The next legal instance in cyclic order; each lane counts for itself from instance 0."""

    name = "round_robin"

    def reset(self, lanes: int, seed: int) -> None:
        """Start every lane at instance 0."""
        super().reset(lanes, seed)
        self._next = np.zeros(lanes, dtype=np.int64)

    def cost(self, view: View) -> np.ndarray:
        """Steps in cyclic order from the lane's next instance, [B, I]."""
        instances = view.legal.shape[1]
        return ((np.arange(instances) - self._next[:, None]) % instances).astype(np.float64)

    def act(self, obs: Observation) -> np.ndarray:
        """Answer one decision per lane, and count it where an instance was legal."""
        answer = super().act(obs)
        # An answer is 1 + the instance, which is also the next instance to try.
        self._next = np.where(answer > 0, answer, self._next)
        return answer
