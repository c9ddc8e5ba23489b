"""Power of two choices: the less loaded of two instances drawn at random.

Mitzenmacher, "The power of two choices in randomized load balancing", IEEE TPDS 12 (2001);
`power_of_two` of SGLang's router and the `p2c` policies of Envoy and nginx.

    {a, b} = two distinct legal instances at random;  argmin_{i in {a, b}} inflight_i, ties at random
"""

from __future__ import annotations

import numpy as np

from servegym.agents.heuristics._rule import Rule, View


class PowerOfTwo(Rule):
    """The one with fewer requests in flight of two random legal instances."""

    name = "power_of_two"
    random_ties = True

    def cost(self, view: View) -> np.ndarray:
        """Requests in flight at the two drawn instances and infinity elsewhere, [B, I]."""
        instances = np.arange(view.legal.shape[1])
        first = instances == self.pick(view.legal)[:, None]
        second = instances == self.pick(view.legal & ~first)[:, None]
        return np.where(first | second, view.instance("inflight"), np.inf)
