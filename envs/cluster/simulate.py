"""Whole episodes without an agent: a workload on a cluster under a rule inside the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from servegym.envs.cluster.episode import Episode
from servegym.envs.cluster.lane import LEAST_REQUEST, ROUND_ROBIN, run_lanes
from servegym.envs.cluster.spec import ClusterSpec
from servegym.envs.cluster.state import NEVER, PS, World
from servegym.envs.cluster.world import build_world
from servegym.envs.records import Records
from servegym.envs.workloads.workload import Workload
from servegym.errors import InputError

RULES = {"round_robin": ROUND_ROBIN, "least_request": LEAST_REQUEST}


def simulate(cluster: ClusterSpec, workload: Workload, rule: str = "round_robin") -> Records:
    """Play a workload on a cluster; for many at once see `simulate_all`.

    Raises:
        InputError: for an unknown rule, and whatever `build_world` refuses.
    """
    return simulate_all([Episode(workload, cluster, workload.output_tokens)], rule)[0]


def simulate_all(episodes: Sequence[Episode], rule: str = "round_robin") -> list[Records]:
    """Play each episode in a lane of its own, one after the other."""
    if rule not in RULES:
        raise InputError("simulate", "rule", rule, f"choose one of {', '.join(RULES)}")
    world = build_world(episodes, len(episodes))
    run_lanes(world, RULES[rule])
    return [records_of(world, lane) for lane in range(len(episodes))]


def records_of(world: World, lane: int) -> Records:
    """Records of the episode that a lane plays or has played, one row a request."""
    state = world.lane[lane]
    req = world.req[lane, : state["rows"]]
    row = world.row[state["first_row"] : state["first_row"] + state["rows"]]
    return Records(
        arrived_s=_seconds(req["arrived"]),
        dispatched_s=_seconds(req["dispatched"]),
        first_token_s=_seconds(req["first"]),
        finished_s=_seconds(req["finished"]),
        max_gap_s=req["gap"] / PS,
        prompt_tokens=row["prompt"].astype(np.int32),
        output_tokens=row["output"].astype(np.int32),
        cached_tokens=req["cached"].copy(),
        lost_tokens=req["lost"].copy(),
        preemptions=req["preemptions"].copy(),
        migrations=req["migrations"].copy(),
        instance=req["instance"].copy(),
        class_id=row["klass"].astype(np.int16),
        priority=row["priority"].astype(np.int16),
    )


def _seconds(ps: np.ndarray) -> np.ndarray:
    return np.where(ps == NEVER, np.nan, ps / PS)
