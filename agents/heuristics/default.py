"""The stock system: candidate 0, whatever the environment's default rule does."""

from __future__ import annotations

import numpy as np

from servegym.agents.heuristics._rule import Rule
from servegym.agents.policy import Observation


class Default(Rule):
    """Always answer 0."""

    name = "default"
    kinds = ()

    def act(self, obs: Observation) -> np.ndarray:
        """Answer 0 in every lane, int64 [B]."""
        return np.zeros(len(obs["mask"]), dtype=np.int64)
