"""`servegym timeline`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from servegym.agents.heuristics import make_heuristic
from servegym.agents.play import roles
from servegym.agents.policy import Observation, Policy
from servegym.envs.cluster.env import ClusterEnv
from servegym.envs.cluster.episode import make_episodes
from servegym.envs.cluster.timeline import record_timeline
from servegym.errors import InputError
from servegym.files import say, write_text
from servegym.flags import Setup, check_seed
from servegym.loading import load_agent

DEFAULT_POLICY = "least_request"
MOST_REQUESTS = 20_000  # some 60 MB, which is what a browser still opens


@dataclass(kw_only=True)
class Command(Setup):
    """Play one episode of a scenario and write it as a trace that https://ui.perfetto.dev opens.

    Shows for each instance its requests by phase, KV memory and queues, and every decision with what was
    known of its candidates.
    """

    requests: int | None = 256
    """Requests of the episode; each takes about 3 kB of the file, and more on large fleets."""
    policy: str | None = None
    """Heuristic that decides (see `servegym heuristics`); least_request by default."""
    trained_agent: Annotated[str | None, tyro.conf.arg(aliases=("-i",))] = None
    """Checkpoint or bundle folder of a policy that decides in its place."""
    seed: int = 0
    """Of the episode and the policy."""
    output: Annotated[str, tyro.conf.arg(aliases=("-o",))] = "runs/timeline.json"
    """File to write."""

    def run(self) -> int:
        """Play, write, say where."""
        check_seed("timeline", self.seed)
        if Path(self.output).is_dir():
            raise InputError("timeline", "output", self.output, "is a folder; give a file")
        policy = self._policy()
        scenario, *others = self.resolve()
        if others:
            raise InputError("timeline", "scenario", self.scenario, "give one")
        if scenario.requests > MOST_REQUESTS:
            raise InputError("timeline", "requests", scenario.requests, f"at most {MOST_REQUESTS}")
        episode = make_episodes(scenario, 1, self.seed)[0]
        # A rule answers 0 to questions of other kinds, which then are on the picture, too; a network cannot.
        decisions, rules = roles(policy, scenario, [episode]) if self.trained_agent else (None, None)
        env = ClusterEnv(
            scenario, decisions=decisions, rules=rules, episodes=[episode], oracle=policy.needs_oracle
        )
        policy.reset(1, self.seed)
        names = [instance.profile for instance in episode.cluster.instances]
        trace = record_timeline(env, _alone(policy), names, seed=self.seed)
        write_text(Path(self.output), json.dumps(trace, allow_nan=False, separators=(",", ":")) + "\n")
        say(f"{policy.name} on {episode.cluster.name}, {len(episode.workload)} requests: {self.output}")
        say("open it at https://ui.perfetto.dev")
        return 0

    def _policy(self) -> Policy:
        if self.trained_agent is None:
            return make_heuristic(self.policy or DEFAULT_POLICY)
        if self.policy is not None:
            raise InputError("timeline", "policy", self.policy, "give a heuristic or an agent, not both")
        return load_agent(self.trained_agent)


def _alone(policy: Policy):
    """The policy's answer to the observation of one lane."""

    def choose(observation: Observation) -> int:
        return int(policy.act({name: np.asarray(part)[None] for name, part in observation.items()})[0])

    return choose
