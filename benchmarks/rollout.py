"""Roll-out decisions per second: environment, default network and draw, in one kernel on two threads.

    python benchmarks/rollout.py

The detail has one thread, the share of each phase (measured by leaving out the others), and beside it in the
same run the batched path, torch's dense network and numpy's with the environment stepped from Python, and the
roll-outs of sb3-contrib's MaskablePPO with the same network.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from report import report, spread
from sb3_contrib import MaskablePPO

from servegym.agents.ppo.rollout import Collector, make_steps, make_tally
from servegym.envs.cluster.episode import make_episodes
from servegym.envs.cluster.sb3 import ServeGymVecEnv
from servegym.envs.cluster.schema import KINDS
from servegym.envs.cluster.vector import ClusterVectorEnv
from servegym.envs.scenario import Migration, Scenario
from servegym.models import numpy_policy
from servegym.models.config import NetworkConfig
from servegym.models.dense import DenseNetwork
from servegym.models.features import ARRAYS
from servegym.models.sb3 import GraphMaskablePolicy

GOAL = 150_000
INSTANCES = 16
LANES, GROUP = 128, 16
STEPS = 256
REPEATS = 7
EPISODES = 32


def make(threads: int, *, copy: bool = False) -> ClusterVectorEnv:
    scenario = Scenario(
        workload="azure2023_conv",
        clusters=(f"{INSTANCES}xa100-llama-3.1-8b",),
        loads=(0.5, 1.0),
        requests=512,
        engine={"swap_gib": 32},
        migration=Migration(),
        budget_period_s=0.5,
    )
    episodes = make_episodes(scenario, EPISODES, seed=0)
    return ClusterVectorEnv(
        LANES, scenario, episodes=episodes, num_threads=threads, copy=copy, group_size=GROUP
    )


def timed(play: Callable[[], int], repeats: int = REPEATS) -> dict[str, float]:
    """Decisions per second of what `play` plays; the first run, which compiles, does not count.

    Also per second of processor time, which other work on the machine hardly changes.
    """
    measured, by_cpu = [], []
    for _ in range(repeats + 1):
        start, busy = time.perf_counter(), time.process_time()
        decisions = play()
        measured.append(decisions / (time.perf_counter() - start))
        by_cpu.append(decisions / (time.process_time() - busy))
    return spread(measured[1:]) | {"per_cpu_s": median(by_cpu[1:])}


def inside(weights: dict[str, np.ndarray], threads: int) -> tuple[dict[str, float], dict[str, float]]:
    """The whole roll-out in a kernel, and the shares of the kinds of questions in the last one."""
    env = make(threads)
    env.reset(seed=0)
    space = env.single_observation_space
    obs = {n: np.zeros((STEPS, LANES, *(space[n].shape or ())), space[n].dtype) for n in ARRAYS}
    steps, tally = make_steps(STEPS, LANES), make_tally(LANES)
    collector = Collector(env, NetworkConfig(), threads, seed=0)

    def play() -> int:
        collector.run(weights, obs, steps, tally)
        return STEPS * LANES

    result = timed(play)
    collector.close()
    env.close()
    shares = np.bincount(obs["kind"].ravel(), minlength=len(KINDS)) / obs["kind"].size
    return result, {kind: round(float(share), 3) for kind, share in zip(KINDS, shares, strict=True) if share}


def outside(answer: Callable[[dict[str, np.ndarray]], np.ndarray], steps: int) -> dict[str, float]:
    """The environment stepped from Python, a batch of all lanes at a time."""
    env = make(2)
    obs, _ = env.reset(seed=0)

    def play() -> int:
        for _ in range(steps):
            env.step(answer(obs))  # copy=False: `obs` is the environment's memory
        return steps * LANES

    result = timed(play, 3)
    env.close()
    return result


def maskable(steps: int) -> dict[str, float]:
    """MaskablePPO's roll-outs, without its updates."""
    env = ServeGymVecEnv(make(2, copy=True))
    settings = {"n_steps": steps, "batch_size": LANES, "policy_kwargs": {"network": NetworkConfig()}}
    model = MaskablePPO(GraphMaskablePolicy, env, seed=0, **settings)
    _, callback = model._setup_learn(1)

    def play() -> int:
        model.collect_rollouts(model.env, callback, model.rollout_buffer, steps)
        return steps * LANES

    result = timed(play, 3)
    env.close()
    return result


def with_torch(network: DenseNetwork) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    def answer(obs: dict[str, np.ndarray]) -> np.ndarray:
        with torch.no_grad():
            logits, _ = network({name: torch.from_numpy(obs[name]) for name in ARRAYS})
            return torch.distributions.Categorical(logits=logits, validate_args=False).sample().numpy()

    return answer


def with_numpy(weights: dict[str, np.ndarray]) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    rng = np.random.default_rng(0)

    def answer(obs: dict[str, np.ndarray]) -> np.ndarray:
        logits, _ = numpy_policy.forward(weights, obs)
        return (logits + rng.gumbel(size=logits.shape)).argmax(1)

    return answer


def main() -> None:
    torch.set_num_threads(1)  # on batches this small a second thread waits more than it works
    network = DenseNetwork(NetworkConfig(), seed=0)
    weights = {name: parameter.numpy() for name, parameter in network.state_dict().items()}
    zeros = np.zeros(LANES, np.int64)
    alone = "environment alone, default answers, 2 threads"
    both, kinds = inside(weights, 2)
    table = {
        "in the lanes, 2 threads": both,
        "in the lanes, 1 thread": inside(weights, 1)[0],
        alone: outside(lambda obs: zeros, STEPS),
        "batches through torch": outside(with_torch(network), 64),
        "batches through numpy": outside(with_numpy(weights), 16),
        "MaskablePPO (sb3-contrib)": maskable(16),
    }
    for name, rates in table.items():
        print(f"{name}: {rates['median']:,.0f} decisions/s")
    value = table["in the lanes, 2 threads"]["median"]
    env = table["in the lanes, 2 threads"]["per_cpu_s"] / table[alone]["per_cpu_s"]
    detail = {
        "decisions_per_s": table,
        "share": {"environment": round(env, 3), "network, draw and storing": round(1 - env, 3)},
        "environment": "Cluster-v0, all kinds of questions",
        "questions": kinds,
        "network": "hidden 32, 2 layers",
        "lanes": LANES,
        "workload": "azure2023_conv at 0.5 to 1.0 of saturation, 512 requests an episode",
        "load_average": os.getloadavg()[0],
    }
    report("rollout", value, "decisions/s", GOAL, detail)


if __name__ == "__main__":
    main()
