"""A policy plays episodes; everything that compares policies goes through here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from servegym.agents.policy import Policy
from servegym.agents.task import Task
from servegym.envs.cluster.decisions import allowed_decisions, kinds_of
from servegym.envs.cluster.episode import Episode
from servegym.envs.cluster.vector import ClusterVectorEnv
from servegym.envs.records import Records
from servegym.envs.scenario import Scenario
from servegym.errors import InputError


@runtime_checkable
class Trained(Protocol):
    """A policy that was trained beside built-in rules for the questions that it does not answer."""

    task: Task


@runtime_checkable
class Watcher(Protocol):
    """A policy to which observations are not enough: search branches the lanes themselves."""

    def watch(self, env: ClusterVectorEnv) -> None:
        """Get hold of the lanes; called before the environment's reset."""
        ...


def play(
    policy: Policy,
    scenario: Scenario,
    episodes: Sequence[Episode],
    num_threads: int = 2,
    seed: int | Sequence[int] = 0,
) -> list[Records]:
    """Play each episode to its end, all at once, each in a lane of its own.

    Questions that the policy does not answer are answered by the rules that it was trained beside, else by
    the stock system's.

    Args:
        policy: one policy, asked for all lanes together.
        scenario: service levels and what the router sees; fleets and requests come from the episodes.
        episodes: what to play.
        num_threads: threads of the cluster model.
        seed: seed of the policy and of the scrape; the requests do not depend on it. Lane l gets seed + l, or
            seed[l].

    Returns:
        records of each episode, in their order.

    Raises:
        InputError: for episodes that cannot be played or ask nothing that the policy answers, and for answers
            that are not legal.
    """
    first = seed if isinstance(seed, int) else int(seed[0])
    decisions, rules = roles(policy, scenario, episodes)
    env = ClusterVectorEnv(
        len(episodes),
        scenario,
        decisions=decisions,
        rules=rules,
        episodes=episodes,
        num_threads=num_threads,
        copy=False,
        oracle=policy.needs_oracle,
    )
    policy.reset(len(episodes), first)
    if isinstance(policy, Watcher):
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


def roles(
    policy: Policy, scenario: Scenario, episodes: Sequence[Episode]
) -> tuple[list[str], dict[str, str]]:
    """What a policy takes of the decisions that can come up, and the built-in rules for the rest.

    Raises:
        InputError: where the episodes have no lever that the policy pulls.
    """
    allowed = allowed_decisions(e.cluster for e in episodes)
    # Something has to be asked of a policy that answers nothing; it answers 0.
    kinds = set(policy.kinds or ("dispatch",))
    decisions = [name for name in allowed if kinds & set(kinds_of((name,)))]
    if not decisions:
        hint = f"scenario {scenario.name} has {', '.join(allowed)} only"
        raise InputError(policy.name, "decisions", ", ".join(policy.kinds), hint)
    others = set(kinds_of(allowed)) - set(kinds_of(decisions))
    trained_beside = policy.task.rules if isinstance(policy, Trained) else {}
    return decisions, {kind: rule for kind, rule in trained_beside.items() if kind in others}
