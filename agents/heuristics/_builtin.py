"""The rules that the cluster model has built in, as policies.

Those for dispatch say what an answer costs once more, in numpy: a router falls back on them where numba is
not installed. The kernels that play the others are imported when they are first needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from servegym.agents.heuristics._rule import Rule
from servegym.agents.policy import Observation
from servegym.envs.cluster import schema
from servegym.envs.cluster.rule_names import PARAMS, RULES

if TYPE_CHECKING:
    from servegym.envs.cluster.observe import Frame


class BuiltIn(Rule):
    """A rule of `servegym.envs.cluster.rules` as a policy.

    Attributes:
        rule: its name there.
    """

    rule: str

    def params(self) -> Sequence[float]:
        """The rule's numbers in the model's order."""
        return ()

    def row(self) -> np.ndarray:
        """The same as `rules.answer` takes them, float64 [PARAMS]."""
        row = np.zeros(PARAMS)
        row[: len(self.params())] = self.params()
        return row

    def act(self, obs: Observation) -> np.ndarray:
        """As `Rule.act`."""
        (kind,) = self.kinds
        if kind == "dispatch":
            return super().act(obs)
        from servegym.envs.cluster.rules import answer_lanes

        self._check_lanes(obs)
        answers = np.empty(len(obs["mask"]), np.int64)
        index = RULES[kind].index(self.rule)
        answer_lanes(_frame_of(obs), schema.KINDS.index(kind), index, self.row(), answers)
        return answers


_TYPES = {"candidates": np.int32, "instance_mask": np.int8, "mask": np.int8, "kind": np.int64}


def _frame_of(obs: Observation) -> Frame:
    """The observation as the model's kernels read it; without copies where it comes from an environment."""
    from servegym.envs.cluster.observe import Frame

    arrays = {
        name: np.require(obs[name], _TYPES.get(name, np.float32), ["C", "W"])
        for name in Frame._fields
        if name != "oracle"
    }
    return Frame(**arrays, oracle=np.zeros((len(obs["mask"]), 0)))
