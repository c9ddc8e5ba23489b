"""One cluster as `gymnasium.Env`: with all its decisions, or with those of one kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode

from servegym.envs.cluster.episode import Episode
from servegym.envs.cluster.moment import Moment, moment_of, words
from servegym.envs.cluster.vector import ClusterVectorEnv, Scenarios
from servegym.envs.cluster.viewer import picture, text
from servegym.envs.records import Records
from servegym.errors import InputError


class ClusterEnv(gymnasium.Env):
    """Run a cluster of LLM engines: where requests go, what gives way, what moves, how much is prefilled.

    ## Description
    A router stands before a fleet of engine replicas, which schedule as vLLM v1 does: continuous batching
    with chunked prefill under a token budget, a paged KV cache, preemption when it is full, and optional
    prefix caching. Replicas may differ in hardware and settings. The environment stops where something is to
    be decided and asks one question; between two questions the cluster model runs, with costs calibrated on
    measured kernels. The agent sees what a router can know: its own book-keeping, a predicted output length,
    and metrics that are as old as the last scrape.

    The agent takes the kinds of questions that `decisions` names; built-in rules answer the others:

    * dispatch: a request has arrived. To which instance does it go?
    * preempt: an instance lacks memory for the next tokens of its requests. Which one gives way, and is its
      KV thrown away and computed again later (recompute), or copied to host memory and back (swap)? Asked
      again until the rest fits.
    * migrate: a migration period has passed. From which instance does a request move to which other one?
      Asked again until the answer is 0 or no pair is left. Behind each pair comes a question of kind move:
      which of the source's requests? Needs a scenario with a migration table.
    * budget: a budget period has passed. How many prompt tokens may an iteration of this instance prefill
      beside its decodes? Needs a scenario with a budget_period_s.

    ## Action Space
    `Discrete(C)`. Every question has up to C possible answers, the candidates; an answer is legal where
    `mask` is 1, and 0 always is: what the stock system would do, or nothing. Sample with
    `action_space.sample(mask=observation["mask"])`. `candidates` says which request row and which instance
    row an answer is about, and `servegym.envs.cluster.schema` what answer k means for each kind:

    | kind | 0 | k >= 1 |
    |---|---|---|
    | dispatch | the default rule's instance | instance k - 1 |
    | preempt | the engine's own victim and mechanism | 1 + 2 row: recompute, 2 + 2 row: swap that request |
    | migrate | nothing (more) moves this time | a pair: from the third column's instance to the second's |
    | move | the default request of the source | the request of row k - 1 |
    | budget | the budget stays | the engine's token budget / 2^(k - 1), at least 16 |

    ## Observation Space
    A `Dict`; `servegym.envs.cluster.schema` names every feature, its unit and where a deployment reads it. I
    is the number of instances of the scenario's largest fleet. Where the agent takes dispatches only and the
    stock system does the rest, R = 1 and C = I + 1; otherwise R = 8 and C = max(I + 1, 17).

    | key | shape | dtype | what |
    |---|---|---|---|
    | `instances` | (I, 20) | float32 | load, memory, settings and speed of each instance |
    | `requests` | (R, 16) | float32 | the requests that the question is about |
    | `candidates` | (C, 3) | int32 | request row, instance row and source row (or -1) of each answer |
    | `edges` | (C, 11) | float32 | per answer: prefix hit, queue, prefill, copies, step and memory after it |
    | `globals` | (5,) | float32 | fleet size, arrival rates, requests in flight |
    | `history` | (16,) | float32 | arrivals in each of the last 16 seconds, latest last |
    | `instance_mask` | (I,) | int8 | 1 where the row is an instance of this fleet |
    | `mask` | (C,) | int8 | 1 where the answer is legal |
    | `kind` | () | int64 | kind of the question, an index into `schema.KINDS` |
    | `oracle` | (C,) | float64 | only with `oracle=True`: what each answer truly costs |

    ## Rewards
    By the scenario's `reward`: `latency`, minus the weighted request-seconds spent in the system since the
    last question, or `goodput`, the weighted number of requests that finished since then within their service
    level; `servegym.envs.cluster.reward` has the formulas. Questions come at irregular times:
    `info["elapsed_s"]` holds the simulated seconds that a transition took, and returns should discount by
    exp(-beta * elapsed_s), with the environment's `beta`. `info["now_s"]` is the time of the question.

    ## Starting State
    An empty cluster, played up to the first question of the agent's kinds. The episode (fleet, load,
    requests) is drawn by the seed from the bank; without a seed, `reset` goes on to the lane's next episode.
    An episode in which nothing is asked starts where it ends: `mask` is 1 at 0 only, and the first step
    terminates it with all of its reward. None is passed over, so that averages are over all episodes.

    ## Episode End
    Terminates when every request of the episode has finished. Then nothing is left to decide: `mask` is 1 at
    0 only. It never truncates by itself; `gymnasium.make(..., max_episode_steps=n)` does.

    ## Arguments
    * `scenario`: a `Scenario`, the name of a shipped one (`mixed` by default), or the path of a TOML file; or
      several of them.
    * `decisions`: what the agent takes, some of `dispatch`, `preempt`, `migrate` and `budget`; None is all
      that the scenario's levers allow.
    * `rules`: kind -> built-in rule, for the kinds that the agent does not take.
    * `episodes`: what to play, the first one first; None draws 64 from each scenario, always the same.
    * `oracle`: add `oracle` to the observation.
    * `render_mode`: None, `ansi` for text, or `rgb_array` for a picture (`servegym.envs.cluster.viewer`).

    ## Vectorized environment
    `gymnasium.make_vec("ServeGym/Cluster-v0", num_envs=B)` makes a `ClusterVectorEnv`, whose lane l equals
    this environment with seed + l. `benchmarks/env.py` measures how fast it steps.

    ## Version History
    * v0: initial version
    """

    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}  # noqa: RUF012 (Gymnasium's name and type)

    def __init__(
        self,
        scenario: Scenarios = "mixed",
        *,
        decisions: Sequence[str] | None = None,
        rules: Mapping[str, str] | None = None,
        episodes: Sequence[Episode] | None = None,
        oracle: bool = False,
        render_mode: str | None = None,
    ) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise InputError("environment", "render_mode", render_mode, "choose None, ansi or rgb_array")
        self.render_mode = render_mode
        self._lane = ClusterVectorEnv(
            1,
            scenario,
            decisions=decisions,
            rules=rules,
            episodes=episodes,
            autoreset_mode=AutoresetMode.NEXT_STEP,
            oracle=oracle,
        )
        self.observation_space = self._lane.single_observation_space
        self.action_space = self._lane.single_action_space
        self.scenarios = self._lane.scenarios
        self.decisions, self.rules = self._lane.decisions, self._lane.rules
        self.beta = self._lane.beta
        self._observation: dict[str, Any] = {}
        self._answered = ""
        self._ended = True

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode; see "Starting State"."""
        super().reset(seed=seed)
        observation, info = self._lane.reset(seed=seed)
        self._ended, self._answered = False, ""
        return self._row(observation), {"now_s": float(info["now_s"][0])}

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
        own = {name: float(info[name][0]) for name in ("elapsed_s", "now_s")}
        return self._row(observation), float(reward[0]), self._ended, bool(truncated[0]), own

    def action_masks(self) -> np.ndarray:
        """Legal answers, bool [C]; the name that sb3-contrib's MaskablePPO looks for."""
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


class DispatchEnv(ClusterEnv):
    """Send each request that reaches a cluster of LLM engines to one of its instances.

    ## Description
    A `ClusterEnv` whose agent takes dispatches only: at every arrival it is asked where the request goes. All
    that is not said here stands there.

    ## Action Space
    `Discrete(C)`. 0 leaves the choice to the default rule (fewest requests in flight, lowest index on
    ties), k >= 1 sends the request to instance k - 1. An answer is legal where the instance exists, does not
    drain, and its KV memory can hold the request.

    ## Arguments
    Those of `ClusterEnv` but `decisions`; `scenario` is `chat` by default.

    ## Version History
    * v0: initial version
    """

    def __init__(self, scenario: Scenarios = "chat", **arguments: Any) -> None:
        super().__init__(scenario, decisions=("dispatch",), **arguments)


class PreemptEnv(ClusterEnv):
    """Choose which request gives way when an engine's KV memory is full.

    ## Description
    A `ClusterEnv` whose agent takes preemptions only: whenever the next tokens of an instance's running
    requests do not fit and at least two of them could give way, it is asked which one does, and again until
    the rest fits. All that is not said here stands there. An episode whose memory suffices asks nothing.

    ## Action Space
    `Discrete(C)`. 0 leaves victim and mechanism to the engine (the request that was admitted last, or with
    `queue = "priority"` the least urgent one). 1 + 2 row gives up that request's KV, to be computed again
    later; 2 + 2 row swaps it to host memory, legal where there is room (`swap_gib` in the scenario's engine
    settings). Rows are up to 8 victims: the favourites of several rules.

    ## Arguments
    Those of `ClusterEnv` but `decisions`; `scenario` is `scarce` by default.

    ## Version History
    * v0: initial version
    """

    def __init__(self, scenario: Scenarios = "scarce", **arguments: Any) -> None:
        super().__init__(scenario, decisions=("preempt",), **arguments)


class MigrateEnv(ClusterEnv):
    """Move requests between the instances of a cluster while they run.

    ## Description
    A `ClusterEnv` whose agent takes migrations only. At every tick of the scenario's migration period it is
    asked for a pair of instances, until it answers 0 or no pair is left; behind each pair it is asked for the
    request that goes, where there is more than one. Waiting requests move at no cost; running ones are
    copied in stages while they decode, as in Llumnix (OSDI'24). All that is not said here stands in
    `ClusterEnv`.

    ## Action Space
    `Discrete(C)`. For a pair (kind migrate): 0 moves nothing more this time, 1 + 4 a + b moves from source a
    to destination b, up to 4 each; `candidates` names the instances. For the request (kind move): 0 is the
    default one, 1 + row that one. An instance that drains is no destination, one that takes part in a
    migration is neither source nor destination, and none is its own destination.

    ## Arguments
    Those of `ClusterEnv` but `decisions`; `scenario`, `scarce` by default, needs a migration table.

    ## Version History
    * v0: initial version
    """

    def __init__(self, scenario: Scenarios = "scarce", **arguments: Any) -> None:
        super().__init__(scenario, decisions=("migrate",), **arguments)


class BudgetEnv(ClusterEnv):
    """Set how much of an iteration each engine spends on prefill.

    ## Description
    A `ClusterEnv` whose agent takes prefill budgets only. At every tick of the scenario's budget period it is
    asked about each instance that has both decodes and prompts to prefill: long chunks shorten the queue,
    short ones the time between tokens (Sarathi-Serve, OSDI'24). All that is not said here stands in
    `ClusterEnv`.

    ## Action Space
    `Discrete(C)`. 0 keeps the instance's budget, k in 1..5 sets it to the engine's token budget / 2^(k - 1),
    at least 16 tokens.

    ## Arguments
    Those of `ClusterEnv` but `decisions`; `scenario`, `chat` by default, needs a budget_period_s.

    ## Version History
    * v0: initial version
    """

    def __init__(self, scenario: Scenarios = "chat", **arguments: Any) -> None:
        super().__init__(scenario, decisions=("budget",), **arguments)
