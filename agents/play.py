"""A policy plays episodes; everything that compares policies goes through here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from servegym.agents.policy import Policy
from servegym.agents.search.lookahead import Lookahead
from servegym.envs.cluster.episode import Episode
from servegym.envs.cluster.vector import DispatchVectorEnv
from servegym.envs.records import Records
from servegym.envs.scenario import Scenario


def play(
    policy: Policy,
    scenario: Scenario | str,
    episodes: Sequence[Episode],
    num_threads: int = 2,
    seed: int = 0,
) -> list[Records]:
    """Play each episode to its end, all at once, each in a lane of its own.

    Args:
        policy: one policy, asked for all lanes together.
        scenario: service levels and what the router sees; fleets and requests come from the episodes.
        episodes: what to play.
        num_threads: threads of the cluster model.
        seed: seed of the policy and of the scrape; the requests do not depend on it.

    Returns:
        records of each episode, in their order.

    Raises:
        InputError: for episodes that cannot be played and for answers that are not legal.
    """
    env = DispatchVectorEnv(
        len(episodes),
        scenario,
        episodes=episodes,
        num_threads=num_threads,
        copy=False,
        oracle=policy.needs_oracle,
    )
    policy.reset(len(episodes), seed)
    if isinstance(policy, Lookahead):
        policy.watch(env)
    obs, _ = env.reset(seed=seed)
    records: list[Records | None] = [None] * len(episodes)
    while any(r is None for r in records):
        obs, _, terminated, _, _ = env.step(policy.act(obs))
        for lane in np.flatnonzero(terminated):
            # A lane that is done early starts another episode, which nobody looks at.
            if records[lane] is None:
                records[lane] = env.records(int(lane))
    env.close()
    return [r for r in records if r is not None]
