"""Dispatch decisions per second with full observations: simulation, observation, reward and autoreset.

    python benchmarks/env.py

Round robin answers, drawn up beforehand, so that no policy is in the time. Observations are the environment's
own buffers (`copy=False`), as a learner on the same machine reads them; the detail has `copy=True` as well.
"""

from __future__ import annotations

import os
import time

import numpy as np
from report import report, spread

from servegym.envs.cluster.episode import make_episodes
from servegym.envs.cluster.vector import DispatchVectorEnv
from servegym.envs.scenario import Scenario

GOAL = 1_000_000
INSTANCES = (4, 16, 64)
THREADS = (1, 2)
LANES = 512
STEPS = 512  # an episode of each lane
REPEATS = 7
EPISODES = 32


def make(instances: int, threads: int, *, copy: bool = False) -> DispatchVectorEnv:
    scenario = Scenario(
        workload="azure2023_conv",
        clusters=(f"{instances}xa100-llama-3.1-8b",),
        loads=(0.5, 1.0),
        requests=512,
    )
    episodes = make_episodes(scenario, EPISODES, seed=0)
    return DispatchVectorEnv(LANES, scenario, episodes=episodes, num_threads=threads, copy=copy)


def rates(env: DispatchVectorEnv, instances: int) -> list[float]:
    """Decisions per second of each repeat; the first run, which compiles, does not count."""
    env.reset(seed=0)
    answers = [np.full(env.num_envs, 1 + k % instances, np.int64) for k in range(STEPS)]
    measured = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        for answer in answers:
            env.step(answer)
        measured.append(STEPS * env.num_envs / (time.perf_counter() - start))
    env.close()
    return measured[1:]


def main() -> None:
    table: dict[str, dict[str, float]] = {}
    for instances in INSTANCES:
        for threads in THREADS:
            key = f"{instances} instances, {threads} thread{'s' if threads > 1 else ''}"
            table[key] = spread(rates(make(instances, threads), instances))
            print(f"{key}: {table[key]['median']:,.0f} decisions/s")
    copied = spread(rates(make(16, 2, copy=True), 16))
    print(f"16 instances, 2 threads, copy=True: {copied['median']:,.0f} decisions/s")
    detail = {
        "decisions_per_s": table,
        "copied_16_instances_2_threads": copied,
        "lanes": LANES,
        "workload": "azure2023_conv at 0.5 to 1.0 of saturation, 512 requests an episode, scrape every 0.2 s",
        "load_average": os.getloadavg()[0],
    }
    report("env", table["16 instances, 2 threads"]["median"], "decisions/s", GOAL, detail)


if __name__ == "__main__":
    main()
