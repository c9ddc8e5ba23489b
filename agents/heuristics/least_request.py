"""Least request: join the shortest queue, counted in requests that the router has in flight.

Winston, "Optimality of the shortest line discipline", J. Applied Probability 14 (1977); LEAST_REQUEST of
Envoy; load balance method `total_requests` of SGLang's data-parallel controller.

    argmin_i inflight_i
"""

from __future__ import annotations

import numpy as np

from servegym.agents.heuristics._builtin import BuiltIn
from servegym.agents.heuristics._rule import View


class LeastRequest(BuiltIn):
    """The instance with the fewest requests in flight."""

    name = "least_request"
    rule = "least_request"

    def cost(self, view: View) -> np.ndarray:
        """Requests in flight, [B, I]."""
        return view.instance("inflight")
