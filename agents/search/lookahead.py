"""Look-ahead: try every answer on the true future, with built-in rules behind it, and keep the best.

A rollout policy (Bertsekas, "Rollout, Policy Iteration, and Distributed Reinforcement Learning", 2020) on a
clairvoyant model: the lane is copied, each candidate is answered in the copy, the requests that will really
come are played by each set of rules, and the best outcome counts. As no deployment knows the future, it is a
bound for what scheduling can win, and a teacher for policies that do not know it.

Where the horizon covers the episode, the best score never falls from one question to the next, since the
rules' own next answer is among those tried; so the search ends no worse than the best of its rules did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from servegym.agents.policy import Observation
from servegym.agents.search.branch import OBJECTIVES, Search, search_lanes
from servegym.envs.cluster.lane import AGENT
from servegym.envs.cluster.rules import RULES, plays
from servegym.envs.cluster.state import NEVER, OWNED, PS
from servegym.envs.cluster.vector import ClusterVectorEnv
from servegym.envs.scenario import LARGEST
from servegym.errors import InputError

MOST_SCREENING_S = 1.0
# What the stock system does with the kinds that a set of rules does not name.
STOCK = {kind: names[1] for kind, names in RULES.items() if len(names) > 1}
BEHIND = ({"dispatch": "least_request"}, {"dispatch": "lmetric"}, {"dispatch": "least_work"})


class Lookahead:
    """The answer with the best true future. Attach it to an environment first: `watch(env)`.

    Args:
        objective: what the future is judged by, summed over the requests that finish, by class weight:
            `goodput`: SLO met, less a hundredth of TTFT and of TPOT as fractions of their SLO; `latency`:
            minus end-to-end seconds; `ttft` and `tpot`: SLO met, less the eighth power of one of the two
            fractions, which the tail dominates.
        behind: sets of rules, kind -> name, that play on behind an answer; the best set counts.
        horizon_s: simulated seconds that a branch plays, then nothing arrives any more and it runs empty by
            the stock system's rules; None: to the end of the episode.
        width: most answers that get such a branch, chosen by branches of an eighth of it, at most 1 s, with
            the first set of rules; the rules' own answers always do. None: all.

    Attributes:
        scores: float64 [B, C], of the last answers; differences count, in units of the objective; -inf for
            candidates that were not tried, and for all where only one was legal.

    Raises:
        InputError: for arguments that cannot be used.
    """

    name: ClassVar[str] = "lookahead"
    needs_oracle: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = tuple(STOCK)

    def __init__(
        self,
        objective: str = "goodput",
        *,
        behind: Sequence[Mapping[str, str]] = BEHIND,
        horizon_s: float | None = None,
        width: int | None = None,
    ) -> None:
        if objective not in OBJECTIVES:
            raise InputError(self.name, "objective", objective, f"choose one of {', '.join(OBJECTIVES)}")
        if len(behind) == 0:
            raise InputError(self.name, "behind", behind, "give at least one set of rules")
        for rules in behind:
            if "round_robin" in rules.values() or "agent" in rules.values():
                hint = "give rules whose answer depends on the question alone"
                raise InputError(self.name, "behind", dict(rules), hint)
        if horizon_s is not None and not 0 <= horizon_s <= LARGEST:
            raise InputError(self.name, "horizon_s", horizon_s, f"give seconds in 0..{LARGEST:g}, or None")
        if width is not None and (isinstance(width, bool) or not isinstance(width, int) or width < 1):
            raise InputError(self.name, "width", width, "give an integer of at least 1, or None")
        chosen = [plays({**STOCK, **rules}) for rules in behind]
        self._behind = np.stack([names for names, _ in chosen])
        self._params = np.stack([params for _, params in chosen])
        self._objective = OBJECTIVES.index(objective)
        horizon = LARGEST if horizon_s is None else horizon_s
        self._spans = round(horizon * PS), round(min(horizon / 8, MOST_SCREENING_S) * PS)
        self._width = int(NEVER) if width is None else width
        self._answers = np.zeros(0, np.int64)

    def watch(self, env: ClusterVectorEnv) -> None:
        """Answer for the lanes of this environment from now on; allocates a second lane for each.

        Questions that the environment leaves to its own rules are left to them behind an answer, too.
        """
        world, frame, *_, own = env.lanes()
        self._crew, self._world = env._crew, world
        self._scratch = world._replace(**{name: np.zeros_like(getattr(world, name)) for name in OWNED})
        # Branches read no oracle, so it is neither copied nor observed there.
        self._seen = frame._replace(oracle=np.zeros((env.num_envs, 0)))
        self._frame = self._seen._replace(**{name: a.copy() for name, a in self._seen._asdict().items()})
        asked = own.plays == AGENT
        rules = np.where(asked, self._behind, own.plays)
        params = np.where(asked[:, None], self._params, own.params)
        ask = own._replace(plays=np.zeros_like(own.plays))
        self._search = Search(self._objective, *self._spans, self._width, rules, params, ask)
        self.scores = np.full(frame.mask.shape, -np.inf)
        self._rank = self.scores.copy()
        self._answers = np.zeros(env.num_envs, np.int64)

    def reset(self, lanes: int, seed: int) -> None:
        """Nothing to forget."""

    def act(self, obs: Observation) -> np.ndarray:
        """The best answers to the questions that the environment has open; `obs` is what it last returned.

        Returns:
            int64 [B]: the index of a legal candidate for each lane.

        Raises:
            InputError: no environment is watched, or `obs` is of another number of lanes.
        """
        if len(obs["mask"]) != len(self._answers):
            hint = f"it watches {len(self._answers)}: call watch(env)"
            raise InputError(self.name, "lanes", len(obs["mask"]), hint)
        self._crew.run(
            search_lanes, self._world, self._seen, self._scratch, self._frame, self._search, self.scores,
            self._rank, self._answers,
        )  # fmt: skip
        return self._answers.copy()
