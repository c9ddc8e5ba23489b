"""A teacher for each scenario, where one network learns several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from servegym.agents.evolved.rule import Evolved, EvolvedDispatch, other_rules
from servegym.agents.policy import Observation
from servegym.envs.cluster.schema import KINDS
from servegym.envs.cluster.vector import ClusterVectorEnv
from servegym.errors import InputError


class ByScenario:
    """Answers each lane by the rule that was evolved for what the lane plays. Attach it first: `watch(env)`.

    It is told which scenario that is, so it can teach, but it cannot be deployed.

    Args:
        rules: scenario -> its evolved rule.
        episodes: the scenario of each of the environment's episodes.

    Raises:
        InputError: for a scenario without a rule.
    """

    name: ClassVar[str] = "evolved"
    kinds: ClassVar[tuple[str, ...]] = KINDS
    needs_oracle: ClassVar[bool] = False

    def __init__(self, rules: Mapping[str, Evolved], episodes: Sequence[str]) -> None:
        names = list(dict.fromkeys(episodes))
        for name in names:
            if name not in rules:
                raise InputError("teacher", "scenario", name, f"there are rules for {', '.join(rules)}")
        self._weights = np.stack([rules[name].weights for name in names])
        self._dispatch = EvolvedDispatch(self._weights[0])
        self._others = [set(other_rules(rules[name].system, rules[name].params).values()) for name in names]
        self._of_episode = np.array([names.index(name) for name in episodes])

    def watch(self, env: ClusterVectorEnv) -> None:
        """Answer for the lanes of this environment from now on."""
        self._lanes = env.lanes().world.lane

    def reset(self, lanes: int, seed: int) -> None:
        """Prepare for `lanes` parallel clusters."""
        for rule in (self._dispatch, *(rule for rules in self._others for rule in rules)):
            rule.reset(lanes, seed)

    def act(self, obs: Observation) -> np.ndarray:
        """As `servegym.agents.policy.Policy.act`."""
        played = self._of_episode[self._lanes["episode"]]
        self._dispatch.weights = self._weights[played]
        answers = self._dispatch.act(obs)
        for k, rules in enumerate(self._others):
            for rule in rules:  # it answers 0 to questions of other kinds than its own
                answers += np.where(played == k, rule.act(obs), 0)
        return answers
