"""vLLM's data-parallel load balancer.

vLLM v0.10.2 and later, `vllm/v1/engine/core_client.py`, `DPLBAsyncMPClient.get_core_engine_for_request`.
The engines' counts come with the scrapes; between two of them the client adds its own requests to the
waiting count of the engine that it chose, and a scrape replaces them. Ties go to the first engine in rank
order (one client starts at rank 0).

With `scrape_s = 0` every decision reads the counts as they are: they hold what was sent, so nothing is added.
Only among requests of the same instant, whose age and gap are both 0 as they are at the start of an episode,
does what was sent count twice.

    argmin_i 4 * (waiting_i + sent_since_scrape_i) + running_i
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from servegym.agents.heuristics._rule import Rule, View, number
from servegym.agents.policy import Observation


class VllmDP(Rule):
    """Least weighted count of waiting and running requests.

    Args:
        waiting_weight: running requests that one waiting request counts for.
    """

    name = "vllm_dp"
    search_space: ClassVar[dict[str, tuple]] = {"waiting_weight": (1.0, 2.0, 4.0, 8.0, 16.0)}

    def __init__(self, waiting_weight: float = 4.0) -> None:
        self.waiting_weight = number(self.name, "waiting_weight", waiting_weight)

    def reset(self, lanes: int, seed: int) -> None:
        """Forget the requests sent since the last scrape."""
        super().reset(lanes, seed)
        self._sent = np.zeros((lanes, 1))
        self._age = np.zeros((lanes, 1))

    def cost(self, view: View) -> np.ndarray:
        """Weighted count of waiting and running requests, [B, I]."""
        age = view.instance("scrape_age")
        # Counts younger than the last decision have been scraped since; so have counts younger than they
        # were, which also tells the start of a new episode, when nothing arrived before.
        fresh = (age < self._age) | (age < view.overall("since_last_arrival_s"))
        self._sent = np.where(fresh & view.asked, 0.0, self._sent)
        self._age = np.where(view.asked, age, self._age)
        return self.waiting_weight * (view.instance("waiting") + self._sent) + view.instance("running")

    def act(self, obs: Observation) -> np.ndarray:
        """Answer one decision per lane, and count it as waiting until the next scrape."""
        answer = super().act(obs)
        self._sent += np.arange(1, self._sent.shape[1] + 1) == answer[:, None]
        return answer
