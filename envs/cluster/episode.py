"""An episode: what one lane plays from reset to end, and how a scenario draws one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from servegym.envs.cluster.spec import ClusterSpec, parse_cluster
from servegym.envs.scenario import Scenario
from servegym.envs.workloads.generators import GENERATORS, generate
from servegym.envs.workloads.predict import predicted_output_tokens
from servegym.envs.workloads.traces import load
from servegym.envs.workloads.transforms import head, scale_rate, window
from servegym.envs.workloads.workload import Workload
from servegym.errors import InputError

SAMPLE_SEED = 0
SAMPLE_REQUESTS = 2048


@dataclass(frozen=True)
class Episode:
    """A workload on a fleet.

    Attributes:
        workload: the requests.
        cluster: the fleet.
        predicted_output: int32 [N], output tokens as a length predictor sees them, at least 1.
    """

    workload: Workload
    cluster: ClusterSpec
    predicted_output: np.ndarray


def make_episodes(scenario: Scenario, count: int, seed: int) -> list[Episode]:
    """Draw episodes: a fleet, a load, and a workload at that fraction of the fleet's saturation.

    Generators draw a fresh workload, an open-loop one at exactly that rate; of a trace the episode takes
    `scenario.requests` requests in a row and scales their rate, which keeps bursts. Episode k depends on
    (seed, k) alone.

    Raises:
        InputError: for a workload, profile or setting that is not there or cannot be used.
    """
    # The cluster model plays episodes, so it can only be imported after them.
    from servegym.envs.cluster.capacity import saturation_rps

    if count < 1:
        raise InputError(f"scenario {scenario.name}", "episodes", count, "draw at least one")
    clusters = [
        parse_cluster(text, prefix_caching=scenario.prefix_caching, **scenario.engine)
        for text in scenario.clusters
    ]
    source = _Source(scenario)
    rates = [saturation_rps(cluster, source.sample) for cluster in clusters]
    episodes = []
    for k in range(count):
        rng = np.random.default_rng([seed, k])
        choice = int(rng.integers(len(clusters)))
        rate = rng.uniform(*scenario.loads) * rates[choice]
        workload = source.draw(rate, rng)
        predicted = predicted_output_tokens(workload, scenario.prediction_error, int(rng.integers(2**31)))
        episodes.append(Episode(workload, clusters[choice], predicted))
    return episodes


def sample_workload(scenario: Scenario) -> Workload:
    """The requests on which `make_episodes` measures a fleet's saturation.

    Raises:
        InputError: for a workload that is not there.
    """
    return _Source(scenario).sample


class _Source:
    """Where a scenario's workloads come from; `sample` shows what its requests are like."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._trace: Workload | None = None
        if scenario.workload.split(":")[0] in GENERATORS:
            self.sample = generate(scenario.workload, SAMPLE_REQUESTS, seed=SAMPLE_SEED)
            return
        if not Path(scenario.workload).is_file():
            known = ", ".join(GENERATORS)
            hint = f"give the path of a trace, or one of {known}"
            raise InputError(f"scenario {scenario.name}", "workload", scenario.workload, hint)
        self._trace = load(scenario.workload)
        self.sample = head(self._trace, SAMPLE_REQUESTS)

    def draw(self, rate_rps: float, rng: np.random.Generator) -> Workload:
        """The workload of one episode."""
        requests = self._scenario.requests
        if self._trace is None:
            seed = int(rng.integers(2**31))
            drawn = generate(self._scenario.workload, requests, rate_rps=rate_rps, seed=seed)
            # The slow swings of a generator's rate are longer than an episode: without this its load would
            # be anything from half to twice what was drawn. Think times of sessions are left as they are.
            return drawn if (drawn.after >= 0).any() else scale_rate(drawn, rate_rps)
        arrived = self._trace.arrived_at_s
        first = int(rng.integers(max(len(arrived) - requests, 0) + 1))
        rest = window(self._trace, float(arrived[first]), float(arrived[-1] - arrived[first]) + 1.0)
        return scale_rate(head(rest, requests), rate_rps)
