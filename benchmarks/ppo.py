"""Decisions per second of PPO end to end, updates included, with the default network and hyperparameters.

    python benchmarks/ppo.py

The detail has the share of each phase, and sb3-contrib's MaskablePPO on the same episodes, with the same
network, minibatches and epochs, in the same run.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from itertools import pairwise
from statistics import median

import torch
from report import report, spread
from sb3_contrib import MaskablePPO

from servegym.agents.ppo import PPO, PPOConfig
from servegym.agents.ppo.ppo import PHASES
from servegym.envs.cluster.episode import Episode, make_episodes
from servegym.envs.cluster.sb3 import ServeGymVecEnv
from servegym.envs.cluster.vector import ClusterVectorEnv
from servegym.envs.scenario import Migration, Scenario
from servegym.models.config import NetworkConfig
from servegym.models.sb3 import GraphMaskablePolicy

GOAL = 15_000
INSTANCES = 16
LANES, GROUP = 128, 16
REPEATS = 5
MASKABLE_STEPS = 32
EPISODES = 32
SCENARIO = Scenario(
    workload="azure2023_conv",
    clusters=(f"{INSTANCES}xa100-llama-3.1-8b",),
    loads=(0.5, 1.0),
    requests=512,
    engine={"swap_gib": 32},
    migration=Migration(),
    budget_period_s=0.5,
)


class TimedPPO(PPO):
    """Remembers when each update ended, by the clock and in processor time, and the phases until then."""

    def train(self) -> None:  # noqa: D102
        super().train()
        self.times.append((time.perf_counter(), time.process_time(), dict(self._seconds)))

    def learn(self, *args: object, **kwargs: object) -> PPO:  # type: ignore[override]  # noqa: D102
        self.times: list[tuple[float, float, dict[str, float]]] = []
        return super().learn(*args, **kwargs)  # type: ignore[arg-type]


def our_rates(episodes: list[Episode], config: PPOConfig) -> tuple[dict[str, float], dict[str, float]]:
    """Decisions per second of each roll-out and update, and the shares of the phases."""
    env = ClusterVectorEnv(LANES, SCENARIO, episodes=episodes, num_threads=2, copy=False, group_size=GROUP)
    model = TimedPPO(env, NetworkConfig(), config)
    decisions = LANES * config.n_steps
    model.learn(decisions)  # compiles
    model.learn(decisions * (1 + REPEATS + 1), log_interval=None)
    env.close()
    rates = [decisions / (b[0] - a[0]) for a, b in pairwise(model.times)]
    by_cpu = [decisions / (b[1] - a[1]) for a, b in pairwise(model.times)]
    spent = {phase: model.times[-1][2][phase] - model.times[0][2][phase] for phase in PHASES}
    return spread(rates) | {"per_cpu_s": median(by_cpu)}, {
        phase: round(s / sum(spent.values()), 3) for phase, s in spent.items()
    }


def maskable_rate(episodes: list[Episode], config: PPOConfig) -> float:
    """Decisions per second of MaskablePPO on shorter roll-outs of as many lanes."""
    env = ServeGymVecEnv(ClusterVectorEnv(LANES, SCENARIO, episodes=episodes, num_threads=2))
    model = MaskablePPO(
        GraphMaskablePolicy,
        env,
        n_steps=MASKABLE_STEPS,
        batch_size=config.batch_size,
        n_epochs=config.n_epochs,
        policy_kwargs={"network": NetworkConfig()},
        seed=0,
    )
    model.learn(LANES * MASKABLE_STEPS)
    start, repeats = time.perf_counter(), 2
    model.learn(LANES * MASKABLE_STEPS * repeats)
    elapsed = time.perf_counter() - start
    env.close()
    return LANES * MASKABLE_STEPS * repeats / elapsed


def main() -> None:
    torch.set_num_threads(2)
    episodes, config = make_episodes(SCENARIO, EPISODES, seed=0), PPOConfig(target_kl=0.0)
    rates, shares = our_rates(episodes, config)
    print(f"PPO: {rates['median']:,.0f} decisions/s, {shares}")
    maskable = maskable_rate(episodes, config)
    print(f"MaskablePPO: {maskable:,.0f} decisions/s")
    detail = {
        "decisions_per_s": {"PPO": rates, "MaskablePPO (sb3-contrib)": maskable},
        "share": shares,
        "environment": "Cluster-v0, all kinds of questions",
        "config": asdict(config),
        "lanes": LANES,
        "workload": "azure2023_conv at 0.5 to 1.0 of saturation, 512 requests an episode",
        "load_average": os.getloadavg()[0],
    }
    report("ppo", rates["median"], "decisions/s", GOAL, detail)


if __name__ == "__main__":
    main()
