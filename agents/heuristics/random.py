"""Uniformly random dispatch; `random` in SGLang's router and Envoy's RANDOM policy."""

from __future__ import annotations

import numpy as np

from servegym.agents.heuristics._rule import Rule, View


class Random(Rule):
    """Every legal instance with equal probability."""

    name = "random"
    random_ties = True

    def cost(self, view: View) -> np.ndarray:
        """The same everywhere, [B, I]."""
        return np.zeros(view.legal.shape)
