"""Session affinity: a session stays where its previous turn ran; a new one goes to the shortest queue.

`session-affinity-scorer` of llm-d and cookie-based affinity of Envoy and nginx.

    the instance of the session's previous turn, if legal;  else argmin_i inflight_i
"""

from __future__ import annotations

import numpy as np

from servegym.agents.heuristics._rule import Rule, View


class SessionAffinity(Rule):
    """The session's last instance, else the one with the fewest requests in flight."""

    name = "session_affinity"

    def cost(self, view: View) -> np.ndarray:
        """Requests in flight, or -1 where the session's previous turn ran, [B, I]."""
        return np.where(view.edge("session_last") > 0, -1.0, view.instance("inflight"))
