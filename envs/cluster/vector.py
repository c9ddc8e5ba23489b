"""Many clusters at once: Gymnasium's vector environment around the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from servegym.envs.cluster.crew import Crew
from servegym.envs.cluster.episode import Episode, make_episodes
from servegym.envs.cluster.observe import Frame, make_frame
from servegym.envs.cluster.simulate import records_of
from servegym.envs.cluster.spaces import observation_space
from servegym.envs.cluster.spec import parse_cluster
from servegym.envs.cluster.state import NEVER, OWNED, World
from servegym.envs.cluster.steps import (
    Finished,
    Rules,
    Transition,
    begin_lanes,
    first_illegal,
    make_finished,
    make_transition,
    step_lanes,
)
from servegym.envs.cluster.world import build_world
from servegym.envs.records import Records
from servegym.envs.scenario import REWARDS, Scenario, load_scenario
from servegym.errors import InputError

BANK = 64  # episodes drawn from a scenario where none are given
BANK_SEED = 0


class Lanes(NamedTuple):
    """The environment's own memory, as the kernels of `steps` take it: for roll-outs inside a kernel."""

    world: World
    frame: Frame
    final: Frame
    finished: Finished
    out: Transition
    rules: Rules


class DispatchVectorEnv(VectorEnv):
    """`ServeGym/Dispatch-v0`, B lanes; `DispatchEnv` describes the environment itself.

    A lane plays one episode after the other, drawn from the bank by its seed. Lane l of `reset(seed=s)` plays
    exactly what a `DispatchEnv` plays after `reset(seed=s + l)`, whatever the number of threads.

    Observations are dicts of `servegym.envs.cluster.schema`'s arrays with a leading dimension B. `info` holds
    `elapsed_s`, float64 [B], the simulated seconds that the transition took. With SAME_STEP it also holds
    `final_obs`, the observations at the end of the episodes that ended, valid where `_final_obs` is true.

    Args:
        num_envs: lanes.
        scenario: a scenario, the name of a shipped one, or the path of a TOML file.
        episodes: what the lanes play, lane l episode l modulo their number first; None draws 64 from the
            scenario, always the same. Give `make_episodes(scenario, count, seed)` for others.
        autoreset_mode: SAME_STEP or NEXT_STEP, as in Gymnasium.
        num_threads: threads that share the lanes.
        max_episode_steps: decisions after which an episode is truncated; None never.
        copy: False returns the same buffers at every step, overwritten by the next.
        group_size: lanes in a row that play the same episodes with the same seed, so that what they meet
            differs by their own decisions only; a divisor of num_envs.
        oracle: add `oracle` to the observation, float64 [B, I], seconds of work truly left on each instance,
            for rules that bound what is possible; no deployment knows them.

    Attributes:
        scenario, num_instances: the scenario, and I, the largest fleet, to which all arrays are padded.
        beta: discount rate, 1/s.

    Raises:
        InputError: for arguments that cannot be used.
    """

    def __init__(
        self,
        num_envs: int = 1,
        scenario: Scenario | str = "chat",
        *,
        episodes: Sequence[Episode] | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        num_threads: int = 1,
        max_episode_steps: int | None = None,
        copy: bool = True,
        group_size: int = 1,
        oracle: bool = False,
    ) -> None:
        for name, value in (("num_envs", num_envs), ("num_threads", num_threads)):
            _require_positive(name, value)
        _require_positive("group_size", group_size)
        if num_envs % group_size:
            raise InputError("environment", "group_size", group_size, f"must divide num_envs ({num_envs})")
        if max_episode_steps is not None:
            _require_positive("max_episode_steps", max_episode_steps)
        if episodes is not None and len(episodes) == 0:
            raise InputError("environment", "episodes", [], "give at least one, or None")
        self.num_envs, self.group_size = num_envs, group_size
        self.scenario = load_scenario(scenario) if isinstance(scenario, str) else scenario
        self.beta = self.scenario.beta
        self.copy = copy
        self.render_mode = None
        self.metadata = {"render_modes": [], "autoreset_mode": _autoreset_mode(autoreset_mode)}
        bank = make_episodes(self.scenario, BANK, BANK_SEED) if episodes is None else episodes
        fleets = [parse_cluster(text) for text in self.scenario.clusters]
        self.num_instances = max(*map(len, fleets), *(len(e.cluster) for e in bank))
        self.single_observation_space = observation_space(self.num_instances, oracle=oracle)
        self._names = tuple(self.single_observation_space.spaces)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.single_action_space = spaces.Discrete(self.num_instances + 1)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._world = build_world(bank, num_envs, scenario=self.scenario)
        self._frame = make_frame(num_envs, self.num_instances, oracle=oracle)
        self._final = make_frame(num_envs, self.num_instances, oracle=oracle)
        self._finished = make_finished(self._world)
        self._out = make_transition(num_envs)
        self._rules = Rules(
            reward=REWARDS.index(self.scenario.reward),
            max_steps=int(NEVER) if max_episode_steps is None else max_episode_steps,
            same_step=self.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP,
            in_order=episodes is not None,
            group_size=group_size,
        )
        bounds = np.linspace(0, num_envs, min(num_threads, num_envs) + 1).astype(int).tolist()
        self._crew = Crew(list(pairwise(bounds)))
        self._seeded = self._started = False

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start a new episode on every lane.

        Args:
            seed: lane l gets seed + l // group_size, or seed[l]; with None each lane goes on with its next
                episode.
            options: not used.
        """
        if seed is None and not self._seeded:
            seed = int(self.np_random.integers(2**31))
        if seed is not None:
            one = isinstance(seed, (int, np.integer))
            seeds = seed + np.arange(self.num_envs) // self.group_size if one else np.asarray(seed)
            if seeds.shape != (self.num_envs,) or seeds.dtype.kind not in "iu" or seeds.min() < 0:
                raise InputError("reset", "seed", seed, f"give an integer >= 0, or {self.num_envs} of them")
            self._world.lane["seed"] = seeds
            self._world.lane["plays"] = 0
            self._seeded = True
        self._crew.run(begin_lanes, self._world, self._frame, self._out, self._rules)
        self._started = True
        return self._observation(self._frame), {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Answer every lane's question.

        Args:
            actions: int64 [B], the index of a legal candidate for each lane.

        Returns:
            observation, reward float64 [B], terminated bool [B], truncated bool [B], info.

        Raises:
            InputError: for an answer that is not legal; nothing has happened then.
        """
        answers = self._checked(actions)
        out = self._out
        self._crew.run(
            step_lanes, self._world, self._frame, self._final, self._finished, out, self._rules, answers
        )
        always = np.ones(self.num_envs, bool)
        info: dict[str, Any] = {"elapsed_s": out.elapsed_s.copy(), "_elapsed_s": always}
        ended = out.terminated | out.truncated
        if self._rules.same_step and ended.any():
            final = self._observation(self._final)
            # Gymnasium's wrappers look for each array's mask, in nested dicts too.
            info["final_obs"] = final | {f"_{name}": ended for name in final}
            info["final_info"] = {"elapsed_s": info["elapsed_s"], "_elapsed_s": ended}
            info["_final_obs"] = info["_final_info"] = ended
        observation = self._observation(self._frame)
        return observation, out.reward.copy(), out.terminated.copy(), out.truncated.copy(), info

    def lanes(self) -> Lanes:
        """The memory of the lanes; whoever steps them there finds the next questions in `frame`."""
        return Lanes(self._world, self._frame, self._final, self._finished, self._out, self._rules)

    def records(self, lane: int) -> Records:
        """Records of the latest episode that a lane has finished.

        Raises:
            InputError: where it has not finished any.
        """
        if not 0 <= lane < self.num_envs or self._finished.lane["plays"][lane] == 0:
            raise InputError("records", "lane", lane, "this lane has not finished an episode")
        return records_of(self._world._replace(**self._finished._asdict()), lane)

    def save_state(self) -> dict[str, np.ndarray]:
        """Copies of all that changes, for `load_state` of an environment made with the same arguments."""
        if not self._started:
            raise InputError("save_state", "environment", "not started", "call reset first")
        return {name: array.copy() for name, array in self._state().items()}

    def load_state(self, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Go on from a saved state, bit for bit.

        Returns:
            the observation at which the state was saved.

        Raises:
            InputError: for a state of an environment of other dimensions; nothing has changed then.
        """
        own = self._state()
        for name, array in own.items():
            saved = state.get(name)
            if saved is None or saved.shape != array.shape or saved.dtype != array.dtype:
                found = None if saved is None else (saved.shape, str(saved.dtype))
                hint = f"expected {array.shape} of {array.dtype}; make the environment as it was made then"
                raise InputError("load_state", name, found, hint)
        for name, array in own.items():
            array[...] = state[name]
        self._seeded = self._started = True
        return self._observation(self._frame)

    def close_extras(self, **kwargs: Any) -> None:
        """End the threads."""
        self._crew.close()

    def _state(self) -> dict[str, np.ndarray]:
        parts = {
            "world": {name: getattr(self._world, name) for name in OWNED},
            "frame": self._frame._asdict(),
            "finished": self._finished._asdict(),
            "out": self._out._asdict(),
        }
        return {f"{part}.{name}": _plain(a) for part, arrays in parts.items() for name, a in arrays.items()}

    def _observation(self, frame: Frame) -> dict[str, np.ndarray]:
        arrays = {name: getattr(frame, name) for name in self._names}
        return {name: array.copy() for name, array in arrays.items()} if self.copy else arrays

    def _checked(self, actions: np.ndarray) -> np.ndarray:
        if not self._started:
            raise InputError("step", "environment", "not started", "call reset first")
        answers = np.asarray(actions)
        if answers.shape != (self.num_envs,) or answers.dtype.kind not in "iu":
            found = (answers.shape, str(answers.dtype))
            raise InputError("step", "actions", found, f"expected {self.num_envs} integers")
        answers = answers.astype(np.int64, copy=False)
        lane = first_illegal(self._frame, self._out, self._rules, answers)
        if lane >= 0:
            raise InputError(
                f"step, lane {lane}", "action", int(answers[lane]), self._reason(lane, answers[lane])
            )
        return answers

    def _reason(self, lane: int, action: int) -> str:
        """Why an answer is not legal."""
        if not 0 <= action <= self.num_instances:
            return f"answers lie in 0..{self.num_instances}"
        if action > self._world.lane["instances"][lane]:
            return f"the cluster has {self._world.lane['instances'][lane]} instances; choose where mask is 1"
        return f"the request does not fit into the KV memory of instance {action - 1}; choose where mask is 1"


def _plain(array: np.ndarray) -> np.ndarray:
    """The same memory without a record type, as file formats want it: records become a last axis of bytes."""
    return array if array.dtype.fields is None else array[..., None].view(np.uint8)


def _require_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise InputError("environment", name, value, "must be an integer of at least 1")


def _autoreset_mode(mode: AutoresetMode | str) -> AutoresetMode:
    try:
        known = AutoresetMode(mode)
    except ValueError:
        known = AutoresetMode.DISABLED
    if known == AutoresetMode.DISABLED:
        raise InputError("environment", "autoreset_mode", mode, "choose NextStep or SameStep")
    return known
