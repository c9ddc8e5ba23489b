"""Many clusters at once: Gymnasium's vector environment around the kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from servegym.envs.cluster.address import by_address
from servegym.envs.cluster.crew import Crew
from servegym.envs.cluster.decisions import (
    divide,
    request_rows,
)
from servegym.envs.cluster.episode import Episode, mix_episodes
from servegym.envs.cluster.observe import Frame, make_frame
from servegym.envs.cluster.refusal import reason
from servegym.envs.cluster.rules import plays
from servegym.envs.cluster.schema import most_candidates
from servegym.envs.cluster.simulate import records_of
from servegym.envs.cluster.spaces import observation_space
from servegym.envs.cluster.spec import parse_cluster
from servegym.envs.cluster.state import NEVER, OWNED, PS, World
from servegym.envs.cluster.steps import (
    Finished,
    Rules,
    Transition,
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

Scenarios = Scenario | str | Sequence[Scenario | str]


@by_address
class Lanes(NamedTuple):
    """The environment's own memory, as the kernels of `steps` take it: for roll-outs inside a kernel."""

    world: World
    frame: Frame
    final: Frame
    finished: Finished
    out: Transition
    rules: Rules


class ClusterVectorEnv(VectorEnv):
    """`ServeGym/Cluster-v0`, B lanes; `ClusterEnv` describes the environment itself.

    A lane plays one episode after the other, drawn from the bank by its seed. Lane l of `reset(seed=s)` plays
    exactly what a `ClusterEnv` plays after `reset(seed=s + l)`, whatever the number of threads.

    Observations are dicts of `servegym.envs.cluster.schema`'s arrays with a leading dimension B. `info` holds
    `elapsed_s`, float64 [B], the simulated seconds that the transition took, and `now_s`, float64 [B], the
    simulated time of the question, seconds since the start of the episode. With SAME_STEP it also holds
    `final_obs`, the observations at the end of the episodes that ended, valid where `_final_obs` is true.

    Args:
        num_envs: lanes.
        scenario: a scenario, the name of a shipped one, or the path of a TOML file; or several of them, which
            then take turns in the bank and must agree on reward and beta.
        decisions: what the agent takes: some of dispatch, preempt, migrate, budget; None: all that the
            scenario's levers allow.
        rules: kind of question -> built-in rule that answers it, of those that the agent does not take;
            those left out get the first of `servegym.envs.cluster.rules.RULES`.
        episodes: what the lanes play, lane l episode l modulo their number first; None draws 64 from each
            scenario, always the same. Give `make_episodes(scenario, count, seed)` for others.
        autoreset_mode: SAME_STEP or NEXT_STEP, as in Gymnasium.
        num_threads: threads that share the lanes.
        max_episode_steps: decisions after which an episode is truncated; None never.
        copy: False returns the same buffers at every step, overwritten by the next.
        group_size: lanes in a row that play the same episodes with the same seed, so that what they meet
            differs by their own decisions only; a divisor of num_envs.
        oracle: add `oracle` to the observation, float64 [B, C], what each answer truly costs, for rules that
            bound what is possible; no deployment knows it.

    Attributes:
        scenarios: what the bank was drawn from.
        num_instances, num_candidates: I, the largest fleet, to which all arrays are padded, and C.
        decisions, rules: what the agent takes, and the rule of each kind of question that it does not.
        beta: discount rate, 1/s.

    Raises:
        InputError: for arguments that cannot be used, decisions without their lever among them.
    """

    def __init__(
        self,
        num_envs: int = 1,
        scenario: Scenarios = "mixed",
        *,
        decisions: Sequence[str] | None = None,
        rules: Mapping[str, str] | None = None,
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
        self.scenarios = load_scenarios(scenario)
        first = self.scenarios[0]
        self.beta = first.beta
        self.copy = copy
        self.render_mode = None
        self.metadata = {"render_modes": [], "autoreset_mode": _autoreset_mode(autoreset_mode)}
        bank = (
            mix_episodes(self.scenarios, BANK * len(self.scenarios), BANK_SEED)
            if episodes is None
            else episodes
        )
        where = f"scenario {', '.join(s.name for s in self.scenarios)}"
        self.decisions, self.rules = divide(decisions, rules, (e.cluster for e in bank), where)
        fleets = [parse_cluster(text) for s in self.scenarios for text in s.clusters]
        self.num_instances = max(*map(len, fleets), *(len(e.cluster) for e in bank))
        size = (self.num_instances, request_rows(self.decisions, self.rules))
        self.single_observation_space = observation_space(*size, oracle=oracle)
        self._names = tuple(self.single_observation_space.spaces)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.num_candidates = most_candidates(*size)
        self.single_action_space = spaces.Discrete(self.num_candidates)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._world = build_world(bank, num_envs, scenario=first)
        self._frame = make_frame(num_envs, *size, oracle=oracle)
        self._final = make_frame(num_envs, *size, oracle=oracle)
        self._finished = make_finished(self._world)
        self._out = make_transition(num_envs)
        chosen, params = plays(self.rules)
        self._rules = Rules(
            reward=REWARDS.index(first.reward),
            max_steps=int(NEVER) if max_episode_steps is None else max_episode_steps,
            same_step=self.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP,
            in_order=episodes is not None,
            group_size=group_size,
            plays=chosen,
            params=params,
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
        # In the NEXT_STEP mode the step behind an episode's end starts the next one.
        self._out.terminated[:] = True
        self._step_lanes(np.zeros(self.num_envs, np.int64), self._rules._replace(same_step=False))
        self._started = True
        return self._observation(self._frame), self._now(self._world.lane)

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
        self._step_lanes(answers, self._rules)
        elapsed = {"elapsed_s": out.elapsed_s.copy(), "_elapsed_s": np.ones(self.num_envs, bool)}
        info: dict[str, Any] = elapsed | self._now(self._world.lane)
        ended = out.terminated | out.truncated
        if self._rules.same_step and ended.any():
            final = self._observation(self._final)
            # Gymnasium's wrappers look for each array's mask, in nested dicts too.
            info["final_obs"] = final | {f"_{name}": ended for name in final}
            final_info = {"elapsed_s": info["elapsed_s"], **self._now(self._finished.lane)}
            info["final_info"] = final_info | {"_elapsed_s": ended, "_now_s": ended}
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

    def _step_lanes(self, answers: np.ndarray, rules: Rules) -> None:
        self._crew.run(
            step_lanes, self._world, self._frame, self._final, self._finished, self._out, rules, answers
        )

    def _now(self, lanes: np.ndarray) -> dict[str, np.ndarray]:
        """The simulated time of lanes, for infos."""
        return {"now_s": lanes["now"] / PS, "_now_s": np.ones(self.num_envs, bool)}

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
            why = reason(self._world, self._frame, lane, int(answers[lane]))
            raise InputError(f"step, lane {lane}", "action", int(answers[lane]), why)
        return answers


class DispatchVectorEnv(ClusterVectorEnv):
    """`ServeGym/Dispatch-v0`, B lanes: a `ClusterVectorEnv` whose agent takes dispatches only."""

    def __init__(self, num_envs: int = 1, scenario: Scenarios = "chat", **arguments: Any) -> None:
        super().__init__(num_envs, scenario, decisions=("dispatch",), **arguments)


class PreemptVectorEnv(ClusterVectorEnv):
    """`ServeGym/Preempt-v0`, B lanes: a `ClusterVectorEnv` whose agent takes preemptions only."""

    def __init__(self, num_envs: int = 1, scenario: Scenarios = "scarce", **arguments: Any) -> None:
        super().__init__(num_envs, scenario, decisions=("preempt",), **arguments)


class MigrateVectorEnv(ClusterVectorEnv):
    """`ServeGym/Migrate-v0`, B lanes: a `ClusterVectorEnv` whose agent takes migrations only."""

    def __init__(self, num_envs: int = 1, scenario: Scenarios = "scarce", **arguments: Any) -> None:
        super().__init__(num_envs, scenario, decisions=("migrate",), **arguments)


class BudgetVectorEnv(ClusterVectorEnv):
    """`ServeGym/Budget-v0`, B lanes: a `ClusterVectorEnv` whose agent takes prefill budgets only."""

    def __init__(self, num_envs: int = 1, scenario: Scenarios = "chat", **arguments: Any) -> None:
        super().__init__(num_envs, scenario, decisions=("budget",), **arguments)


def load_scenarios(scenario: Scenarios) -> tuple[Scenario, ...]:
    """One scenario or several, by value, name or path.

    Raises:
        InputError: for none, what `load_scenario` refuses, and several that differ in reward or beta.
    """
    given = [scenario] if isinstance(scenario, Scenario | str) else list(scenario)
    if not given:
        raise InputError("environment", "scenario", given, "give at least one")
    loaded = tuple(load_scenario(s) if isinstance(s, str) else s for s in given)
    for other in loaded[1:]:
        for name in ("reward", "beta"):
            ours = getattr(loaded[0], name)
            if getattr(other, name) != ours:
                hint = f"scenario {loaded[0].name} has {ours}; scenarios that are mixed must agree"
                raise InputError(f"scenario {other.name}", name, getattr(other, name), hint)
    return loaded


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
