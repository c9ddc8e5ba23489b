"""Uniformly random dispatch; `random` in SGLang's router and Envoy's RANDOM policy."""

from __future__ import annotations

import numpy as np

from servegym.agents.heuristics._rule import Rule, View


class Random(Rule):
    """Every legal instance with equal probability."""

    name = "random"

    def cost(self, view: View) -> np.ndarray:
        """Independent uniform draws, [B, I]: the least is at a uniformly random legal instance."""
        return self._rng.random(view.legal.shape)
