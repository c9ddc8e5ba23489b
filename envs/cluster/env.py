"""One cluster: the dispatch environment as `gymnasium.Env`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode

from servegym.envs.cluster.episode import Episode
from servegym.envs.cluster.moment import Moment, moment_of, words
from servegym.envs.cluster.vector import DispatchVectorEnv
from servegym.envs.cluster.viewer import picture, text
from servegym.envs.records import Records
from servegym.envs.scenario import Scenario
from servegym.errors import InputError


class DispatchEnv(gymnasium.Env):
    """Send each request that reaches a cluster of LLM engines to one of its instances.

    ## Description
    A router stands before a fleet of engine replicas, which schedule as vLLM v1 does: continuous batching
    with chunked prefill under a token budget, a paged KV cache, preemption by recompute when it is full, and
    optional prefix caching. Replicas may differ in hardware and settings. At every arrival the environment
    asks where the request goes. Between two questions the cluster model runs, with costs calibrated on
    measured kernels. The agent sees what a router can know: its own book-keeping, a predicted output length,
    and metrics that are as old as the last scrape.

    ## Action Space
    `Discrete(I + 1)`, I being the instances of the scenario's largest fleet. 0 leaves the choice to the
    default rule (fewest requests in flight, lowest index on ties), k >= 1 sends the request to instance
    k - 1. An answer is legal where `mask` is 1: the instance exists and its KV memory can hold the request.
    Answer 0 always is. Sample with `action_space.sample(mask=observation["mask"])`.

    ## Observation Space
    A `Dict`; `servegym.envs.cluster.schema` names every feature, its unit and where a deployment reads it.

    | key | shape | dtype | what |
    |---|---|---|---|
    | `instances` | (I, 16) | float32 | load, memory, settings and speed of each instance |
    | `requests` | (1, 8) | float32 | the request: prompt, predicted output, priority, service level, turn |
    | `candidates` | (I + 1, 2) | int32 | request row and instance row that each answer joins |
    | `edges` | (I + 1, 7) | float32 | per answer: prefix hit, queue, prefill, step and memory after it |
    | `globals` | (5,) | float32 | fleet size, arrival rates, requests in flight |
    | `history` | (16,) | float32 | arrivals in each of the last 16 seconds, latest last |
    | `instance_mask` | (I,) | int8 | 1 where the row is an instance of this fleet |
    | `mask` | (I + 1,) | int8 | 1 where the answer is legal |
    | `kind` | () | int64 | kind of the question, always dispatch |
    | `oracle` | (I,) | float64 | only with `oracle=True`: seconds of work truly left on each instance |

    ## Rewards
    By the scenario's `reward`: `latency`, minus the weighted request-seconds spent in the system since the
    last question, or `goodput`, the weighted number of requests that finished since then within their service
    level; `servegym.envs.cluster.reward` has the formulas. Questions come at irregular times:
    `info["elapsed_s"]` holds the simulated seconds that a transition took, and returns should discount by
    exp(-beta * elapsed_s), with the environment's `beta`.

    ## Starting State
    An empty cluster at the first arrival. The episode (fleet, load, requests) is drawn by the seed from the
    bank; without a seed, `reset` goes on to the lane's next episode.

    ## Episode End
    Terminates when every request of the episode has finished. Then nothing is left to decide: `mask` is 1 at
    0 only. It never truncates by itself; `gymnasium.make(..., max_episode_steps=n)` does.

    ## Arguments
    * `scenario`: a `Scenario`, the name of a shipped one (default `chat`), or the path of a TOML file.
    * `episodes`: what to play, the first one first; None draws 64 from the scenario, always the same.
    * `oracle`: add `oracle` to the observation.
    * `render_mode`: None, `ansi` for text, or `rgb_array` for a picture (`servegym.envs.cluster.viewer`).

    ## Vectorized environment
    `gymnasium.make_vec("ServeGym/Dispatch-v0", num_envs=B)` makes a `DispatchVectorEnv`, whose lane l equals
    this environment with seed + l. `benchmarks/env.py` measures how fast it steps.

    ## Version History
    * v0: initial version
    """

    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}  # noqa: RUF012 (Gymnasium's name and type)

    def __init__(
        self,
        scenario: Scenario | str = "chat",
        *,
        episodes: Sequence[Episode] | None = None,
        oracle: bool = False,
        render_mode: str | None = None,
    ) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise InputError("environment", "render_mode", render_mode, "choose None, ansi or rgb_array")
        self.render_mode = render_mode
        self._lane = DispatchVectorEnv(
            1, scenario, episodes=episodes, autoreset_mode=AutoresetMode.NEXT_STEP, oracle=oracle
        )
        self.observation_space = self._lane.single_observation_space
        self.action_space = self._lane.single_action_space
        self.scenario = self._lane.scenario
        self.beta = self._lane.beta
        self._observation: dict[str, Any] = {}
        self._answered = ""
        self._ended = True

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode; see "Starting State"."""
        super().reset(seed=seed)
        observation, _ = self._lane.reset(seed=seed)
        self._ended, self._answered = False, ""
        return self._row(observation), {}

    def step(self, action: int) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Answer the question; see "Action Space".

        Raises:
            InputError: for an answer that is not legal, and after the end of an episode.
        """
        if self._ended:
            raise InputError("step", "environment", "ended", "call reset first")
        asked = self.moment().asked if self.render_mode else ()
        before = self._observation
        observation, reward, terminated, truncated, info = self._lane.step(np.array([action]))
        if self.render_mode:
            self._answered = words(before, action, asked)
        self._ended = bool(terminated[0])
        elapsed = {"elapsed_s": float(info["elapsed_s"][0])}
        return self._row(observation), float(reward[0]), self._ended, bool(truncated[0]), elapsed

    def action_masks(self) -> np.ndarray:
        """Legal answers, bool [I + 1]; the name that sb3-contrib's MaskablePPO looks for."""
        return self._observation["mask"].astype(bool)

    def records(self) -> Records:
        """Records of the latest finished episode.

        Raises:
            InputError: before the end of the first.
        """
        return self._lane.records(0)

    def moment(self) -> Moment:
        """What the cluster truly holds at the question; for people and their tools, not for agents.

        Raises:
            InputError: before the first reset.
        """
        if not self._observation:
            raise InputError("moment", "environment", "not started", "call reset first")
        return moment_of(self._lane._world, 0)

    def render(self) -> str | np.ndarray | None:  # type: ignore[override]
        """Text or a picture of the question and the cluster, by the render mode; see `viewer`."""
        if self.render_mode is None or not self._observation:
            return None
        draw = text if self.render_mode == "ansi" else picture
        return draw(self._observation, self.moment(), self._answered)

    def close(self) -> None:
        """Nothing to free but the lane."""
        self._lane.close()

    def _row(self, observation: dict[str, np.ndarray]) -> dict[str, Any]:
        self._observation = {name: array[0] for name, array in observation.items()}
        return dict(self._observation)
