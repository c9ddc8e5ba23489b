"""Victim by the output truly left, which no deployment knows.

As `victim_least_left`, with the simulator's word for the tokens to come: the gap between the two is what
better predictions could give.

    argmax_r true_left_tokens_r;  then argmin prefill_s + copy_s
"""

from __future__ import annotations

import numpy as np

from servegym.agents.heuristics.victim_least_left import VictimLeastLeft
from servegym.agents.policy import Observation
from servegym.envs.cluster import schema
from servegym.errors import InputError

_LEFT = schema.column(schema.REQUEST, "predicted_left_tokens")


class VictimLeastLeftOracle(VictimLeastLeft):
    """Most output truly left."""

    name = "victim_least_left_oracle"
    needs_oracle = True

    def act(self, obs: Observation) -> np.ndarray:
        """As `Rule.act`.

        Raises:
            InputError: the observation does not carry the oracle.
        """
        if "oracle" not in obs:
            raise InputError(self.name, "observation key", "oracle", "make the environment with oracle=True")
        requests = obs["requests"].copy()
        lane, k = np.nonzero(obs["mask"][:, 1:])
        requests[lane, obs["candidates"][lane, k + 1, 0], _LEFT] = obs["oracle"][lane, k + 1]
        return super().act({**obs, "requests": requests})
