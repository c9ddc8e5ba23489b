"""What the rules share: features by name, the masked choice, parameter checks."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from servegym.agents.policy import Observation
from servegym.envs.cluster import schema
from servegym.errors import InputError

_INSTANCE = {feature.name: index for index, feature in enumerate(schema.INSTANCE)}
_REQUEST = {feature.name: index for index, feature in enumerate(schema.REQUEST)}
_EDGE = {feature.name: index for index, feature in enumerate(schema.EDGE)}
_GLOBAL = {feature.name: index for index, feature in enumerate(schema.GLOBAL)}


# Random numbers that a lane's generator draws at a time: the loop over the lanes is rare, the block small.
_BLOCK = 256


class View:
    """A batch of observations as dispatch rules see it, read by feature name.

    Features come as float64, because products of counts and tokens pass what float32 holds exactly, and
    a rounded score would turn an ordering into a tie.

    Attributes:
        asked: bool [B, 1], where the question is a dispatch.
        legal: bool [B, I], instances that the request may go to; none where the question is another.
    """

    def __init__(self, obs: Observation) -> None:
        self._obs = obs
        self._last = obs["instances"].shape[1] + 1
        self.asked = obs["kind"][:, None] == schema.KINDS.index("dispatch")
        self.legal = (obs["mask"][:, 1 : self._last] != 0) & self.asked

    def instance(self, name: str) -> np.ndarray:
        """Feature of every instance, [B, I]."""
        return self._obs["instances"][:, :, _INSTANCE[name]].astype(np.float64)

    def edge(self, name: str) -> np.ndarray:
        """Feature of sending the request to each instance, [B, I]."""
        return self._obs["edges"][:, 1 : self._last, _EDGE[name]].astype(np.float64)

    def request(self, name: str) -> np.ndarray:
        """Feature of the request, [B, 1]."""
        return self._obs["requests"][:, :1, _REQUEST[name]].astype(np.float64)

    def overall(self, name: str) -> np.ndarray:
        """Global feature, [B, 1]."""
        column = _GLOBAL[name]
        return self._obs["globals"][:, column : column + 1].astype(np.float64)

    def oracle(self, rule: str) -> np.ndarray:
        """Seconds of work truly left on each instance, [B, I].

        Raises:
            InputError: the observation does not carry it.
        """
        if "oracle" not in self._obs:
            raise InputError(rule, "observation key", "oracle", "make the environment with oracle=True")
        return self._obs["oracle"][:, 1 : self._last].astype(np.float64)

    def hit_fraction(self) -> np.ndarray:
        """Share of the prompt that each instance has cached, [B, I]."""
        return self.edge("prefix_hit_tokens") / np.maximum(self.request("prompt_tokens"), 1.0)

    def min_max(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Least and largest of `values` [B, I] over the legal instances, each [B, 1].

        No feature is negative; a lane without a legal instance yields (0, 0).
        """
        high = np.where(self.legal, values, 0.0).max(axis=1, keepdims=True)
        low = np.where(self.legal, values, np.inf).min(axis=1, keepdims=True)
        return np.minimum(low, high), high


class Rule:
    """A policy for questions of some kinds; it answers 0, the default, to others.

    This class is a dispatch rule: the legal instance of least cost, or the default where none is legal.

    Attributes:
        kinds: questions that it answers, of `schema.KINDS`.
        random_ties: ties are drawn from the lane's generator instead of going to the lowest index; only
            for rules whose publication does so.
        search_space: tunable parameters and the values that `servegym.agents.heuristics.tuning` tries.
    """

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]] = ("dispatch",)
    needs_oracle: ClassVar[bool] = False
    random_ties: ClassVar[bool] = False
    search_space: ClassVar[dict[str, tuple]] = {}

    _lanes: int | None = None

    @classmethod
    def defaults(cls) -> dict[str, object]:
        """Parameters with their published values."""
        if cls.__init__ is object.__init__:
            return {}
        return {name: field.default for name, field in inspect.signature(cls).parameters.items()}

    def reset(self, lanes: int, seed: int) -> None:
        """Forget everything and prepare for `lanes` parallel clusters."""
        self._lanes = lanes
        self._generators = [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(lanes)]
        self._block = np.empty((lanes, 0))
        self._drawn = 0

    def uniform(self) -> np.ndarray:
        """The next number in [0, 1) of each lane's own generator, [B, 1].

        A lane gets the same numbers however many lanes there are, and however wide their rows.
        """
        if self._drawn == self._block.shape[1]:
            self._block = np.stack([generator.random(_BLOCK) for generator in self._generators])
            self._drawn = 0
        self._drawn += 1
        return self._block[:, self._drawn - 1 : self._drawn]

    def pick(self, among: np.ndarray) -> np.ndarray:
        """A uniformly random true column of each row of `among` [B, I]; int64 [B], 0 where none is."""
        rank = among.cumsum(axis=1)
        return (rank > np.floor(self.uniform() * rank[:, -1:])).argmax(axis=1)

    def cost(self, view: View) -> np.ndarray:
        """What sending the request to each instance costs, [B, I]; lower is better."""
        raise NotImplementedError

    def act(self, obs: Observation) -> np.ndarray:
        """Answer one question per lane.

        Args:
            obs: arrays of `servegym.envs.cluster.schema` with a leading lane dimension B.

        Returns:
            int64 [B]: a legal candidate; 0 where the rule wants no other or the question is not its kind.

        Raises:
            InputError: B is not the number of lanes of the last `reset`.
        """
        self._check_lanes(obs)
        view = View(obs)
        # A legal instance of infinite cost must still beat every illegal one.
        cost = np.minimum(self.cost(view), np.finfo(np.float64).max)
        cost[~view.legal] = np.inf
        best = self.pick(cost == cost.min(axis=1, keepdims=True)) if self.random_ties else cost.argmin(axis=1)
        return np.where(view.legal.any(axis=1), best + 1, 0)

    def _check_lanes(self, obs: Observation) -> None:
        if len(obs["mask"]) != self._lanes:
            raise InputError(self.name, "lanes", len(obs["mask"]), f"reset prepared for {self._lanes}")


def load(free: np.ndarray, requests: np.ndarray) -> np.ndarray:
    """Llumnix's load, the negated freeness: tokens for each request; an idle instance has minus infinity."""
    return np.where(requests > 0.0, -free / np.maximum(requests, 1.0), -np.inf)


def choice(rule: str, field: str, value: object, options: Sequence[str]) -> str:
    """A parameter that must be one of some words.

    Raises:
        InputError: it is not.
    """
    if not isinstance(value, str) or value not in options:
        raise InputError(rule, field, value, f"choose {' or '.join(options)}")
    return value


def number(rule: str, field: str, value: object, high: float = math.inf) -> float:
    """A parameter that must be a finite number in [0, high].

    Raises:
        InputError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(rule, field, value, "give a finite number")
    if not 0 <= value <= high:
        raise InputError(rule, field, value, f"give a number in [0, {high:g}]")
    return float(value)
