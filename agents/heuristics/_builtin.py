"""The rules that the cluster model has built in, as policies.

Those for dispatch say what an answer costs once more, in numpy: a router falls back on them where numba is
not installed. The kernels that play the others are imported when they are first needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
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

    def reset(self, lanes: int, seed: int) -> None:
        """As `Rule.reset`; loads the kernel, which takes half a second, before a question waits for it."""
        super().reset(lanes, seed)
        if "dispatch" not in self.kinds and find_spec("numba"):
            from servegym.envs.cluster.observe import make_frame

            self._answers(make_frame(0, 1))

    def act(self, obs: Observation) -> np.ndarray:
        """As `Rule.act`."""
        if "dispatch" in self.kinds:
            return super().act(obs)
        self._check_lanes(obs)
        return self._answers(_frame_of(obs))

    def _answers(self, frame: Frame) -> np.ndarray:
        from servegym.envs.cluster.rules import answer_lanes

        (kind,) = self.kinds
        answers = np.empty(len(frame.mask), np.int64)
        answer_lanes(frame, schema.KINDS.index(kind), RULES[kind].index(self.rule), self.row(), answers)
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
