"""What each part of training adds, at equal wall time: goodput of four runs on the same episodes.

    python benchmarks/ablation.py --seconds 40

Plain PPO, then with group-relative advantages, then behind imitation of a heuristic, then behind look-ahead
labels, too. Every path is played once before the clock starts, so that nothing compiles on it; each warm-up
gets a share of its run's seconds and PPO the rest. The detail has goodput, P99 TTFT and mean E2E with 95%
intervals, and the paired difference of each run to plain PPO.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import asdict, dataclass

import torch
from report import report
from stable_baselines3.common.callbacks import BaseCallback

from servegym.agents.heuristics import make_heuristic
from servegym.agents.ppo import PPO, NetworkPolicy, PPOConfig, imitate, improve
from servegym.agents.search.lookahead import Lookahead
from servegym.agents.task import Task
from servegym.envs.cluster.episode import make_episodes
from servegym.envs.cluster.vector import ClusterVectorEnv
from servegym.envs.metrics import Interval
from servegym.envs.scenario import Scenario, load_scenario
from servegym.evaluation import Row, Setting, episodes_of, measure
from servegym.models.config import NetworkConfig
from servegym.training import EVAL_SEED

GOAL = 1.0
LANES, GROUP = 64, 16
EPISODES = 128
SEEDS = 5
CONFIG = PPOConfig(n_steps=64, batch_size=1024, anneal=False)
METRICS = {"goodput": 100.0, "ttft_p99_s": 1.0, "e2e_mean_s": 1.0}


@dataclass(frozen=True)
class Run:
    """One way to train; shares are of its seconds."""

    name: str
    group_size: int
    imitation: float = 0.0
    lookahead: float = 0.0


RUNS = (
    Run("plain PPO", 1),
    Run("+ group advantages", GROUP),
    Run("+ imitation", GROUP, 0.25),
    Run("+ look-ahead labels", GROUP, 0.25, 0.5),
)


class Deadline(BaseCallback):
    """Ends training at a time of `time.perf_counter`, and at once where that has passed."""

    def __init__(self, at: float) -> None:
        super().__init__()
        self._at = at

    def _on_step(self) -> bool:
        return time.perf_counter() < self._at


def make_trainer(run: Run, scenario: Scenario) -> PPO:
    env = ClusterVectorEnv(
        LANES,
        scenario,
        episodes=make_episodes(scenario, EPISODES, seed=0),
        num_threads=2,
        copy=False,
        group_size=run.group_size,
    )
    task = Task("ServeGym/Cluster-v0", env.decisions, env.rules, (asdict(scenario),))
    return PPO(env, NetworkConfig(), CONFIG, seed=0, task=task)


def warm_up(model: PPO, teacher: str, search: Lookahead, updates: tuple[int, int]) -> tuple[float, float]:
    """Imitate and improve, and the seconds that each took."""
    start = time.perf_counter()
    if updates[0]:
        imitate(model, make_heuristic(teacher), updates[0])
    between = time.perf_counter()
    if updates[1]:
        improve(model, search, updates[1])
    return between - start, time.perf_counter() - between


def seconds_an_update(scenario: Scenario, teacher: str, search: Lookahead) -> tuple[float, float]:
    """Of imitation and of look-ahead, when all is compiled: from two updates behind one that compiles."""
    model = make_trainer(RUNS[-1], scenario)
    warm_up(model, teacher, search, (1, 1))
    model.learn(LANES * CONFIG.n_steps)
    took = warm_up(make_trainer(RUNS[-1], scenario), teacher, search, (2, 2))
    return took[0] / 2, took[1] / 2


def train(
    run: Run, scenario: Scenario, teacher: str, search: Lookahead, seconds: float, each: tuple[float, float]
) -> tuple[NetworkPolicy, dict[str, object]]:
    """A policy and what its seconds were spent on."""
    model = make_trainer(run, scenario)
    start = time.perf_counter()
    updates = (int(run.imitation * seconds / each[0]), int(run.lookahead * seconds / each[1]))
    took = warm_up(model, teacher, search, updates)
    model.learn(10**9, Deadline(start + seconds), log_interval=None)  # type: ignore[arg-type]
    spent = {
        "seconds": round(time.perf_counter() - start, 1),
        "imitation": {"updates": updates[0], "seconds": round(took[0], 1)},
        "look-ahead": {"updates": updates[1], "seconds": round(took[1], 1)},
        "PPO decisions": model.num_timesteps,
    }
    model.vector_env.close()
    return NetworkPolicy(model.network, run.name, model.task), spent


def rounded(value: Interval, factor: float) -> dict[str, float]:
    return {"mean": round(value.mean * factor, 3), "half_width": round(value.half_width * factor, 3)}


def summary(row: Row, plain: Row) -> dict[str, object]:
    found: dict[str, object] = {name: rounded(row.interval(name), factor) for name, factor in METRICS.items()}
    return found | {"goodput over plain PPO": rounded(row.against(plain, "goodput"), 100.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--scenario", default="mixed")
    parser.add_argument("--seconds", type=float, default=40.0, help="of each run")
    parser.add_argument("--teacher", default="lmetric", help="heuristic to imitate")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    scenario = load_scenario(flags.scenario)
    setting = Setting(scenario.clusters[len(scenario.clusters) // 2], sum(scenario.loads) / 2)
    episodes = episodes_of(scenario, setting, SEEDS, EVAL_SEED)
    search = Lookahead(behind=[{"dispatch": "lmetric"}], horizon_s=5.0, width=6)
    each = seconds_an_update(scenario, flags.teacher, search)
    rows: list[Row] = []
    results: dict[str, object] = {}
    for run in RUNS:
        policy, spent = train(run, scenario, flags.teacher, search, flags.seconds, each)
        rows.append(measure(policy, scenario, episodes))
        found = summary(rows[-1], rows[0])
        results[run.name] = found | {"spent": spent}
        print(f"{run.name}: {found}, {spent}")
    teacher = measure(make_heuristic(flags.teacher), scenario, episodes)
    detail = {
        "runs": results,
        f"heuristic {flags.teacher}": summary(teacher, rows[0]),
        "environment": "Cluster-v0",
        "scenario": f"{scenario.name}: {setting.cluster} at {setting.load:g} of saturation, {SEEDS} seeds",
        "config": asdict(CONFIG) | {"lanes": LANES, "group_size": GROUP},
        "load_average": os.getloadavg()[0],
    }
    gain = rows[-1].against(rows[0], "goodput").mean * 100
    report("ablation", round(gain, 3), "points of goodput over plain PPO", GOAL, detail)


if __name__ == "__main__":
    main()
