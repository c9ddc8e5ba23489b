"""Mooncake's Conductor without remote prefixes: least predicted time to first token.

Qin et al., "Mooncake: Trading More Storage for Less Computation", FAST'25 (arXiv 2407.00079), algorithm
1, over local prefill; prefixes are not copied between instances here and no request is rejected. Both
terms know the speed of the instance, so the rule suits mixed fleets.

    argmin_i  queue_s_i + prefill_s_i(prompt - hit_i)
"""

from __future__ import annotations

import numpy as np

from servegym.agents.heuristics._builtin import BuiltIn
from servegym.agents.heuristics._rule import View


class Mooncake(BuiltIn):
    """Least predicted TTFT."""

    name = "mooncake"
    rule = "mooncake"

    def cost(self, view: View) -> np.ndarray:
        """Seconds of prefill until the first token, [B, I]."""
        return view.edge("queue_s") + view.edge("prefill_s")
