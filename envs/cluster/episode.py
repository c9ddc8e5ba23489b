"""An episode: what one lane plays from reset to end, and how a scenario draws one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from servegym.envs.cluster.spec import ClusterSpec, parse_cluster
from servegym.envs.scenario import Scenario
from servegym.envs.workloads.generators import GENERATORS, generate
from servegym.envs.workloads.predict import predicted_output_tokens
from servegym.envs.workloads.traces import load
from servegym.envs.workloads.transforms import assign, head, prioritise, scale_rate, slice_rows
from servegym.envs.workloads.workload import Workload
from servegym.errors import InputError

SAMPLE_SEED = 0
SAMPLE_REQUESTS = 2048
SAMPLE_RATE_RPS = 10.0
LEAST_WINDOW = 50  # requests; the tail of fewer says nothing


@dataclass(frozen=True)
class Episode:
    """A workload on a fleet.

    Attributes:
        workload: the requests.
        cluster: the fleet.
        predicted_output: int32 [N], output tokens as a length predictor sees them, at least 1.
        scenario: what it was drawn from: its service levels and staleness; None: the environment's.
    """

    workload: Workload
    cluster: ClusterSpec
    predicted_output: np.ndarray
    scenario: Scenario | None = None


def make_episodes(scenario: Scenario, count: int, seed: int, *, disjoint: bool = False) -> list[Episode]:
    """Draw episodes: a fleet, a load, and a workload at that fraction of the fleet's saturation.

    Generators draw a fresh workload, an open-loop one at exactly that rate; of a trace the episode takes
    `scenario.requests` requests in a row and scales their rate, which keeps bursts. Sessions of a trace
    without a clock are played closed-loop at that rate instead. Episode k depends on (seed, k) alone.

    Args:
        scenario: what to draw from.
        count: how many.
        seed: of all draws.
        disjoint: of a trace, give episode k the k-th of `count` windows without a common request instead of a
            random one, each as long as `scenario.requests` and the trace allow: independent samples.

    Raises:
        InputError: for a workload, profile or setting that is not there or cannot be used, and for a trace of
            fewer than 50 requests a disjoint window.
    """
    # The cluster model plays episodes, so it can only be imported after them.
    from servegym.envs.cluster.capacity import saturation_rps

    if count < 1:
        raise InputError(f"scenario {scenario.name}", "episodes", count, "draw at least one")
    clusters = fleets_of(scenario)
    source = _Source(scenario)
    _check_classes(scenario, source.sample)
    windows = count if disjoint else 0
    rates = [saturation_rps(cluster, source.sample) for cluster in clusters]
    episodes = []
    for k in range(count):
        rng = np.random.default_rng([seed, k])
        choice = int(rng.integers(len(clusters)))
        rate = rng.uniform(*scenario.loads) * rates[choice]
        workload = source.draw(rate, rng, k, windows)
        predicted = predicted_output_tokens(workload, scenario.prediction_error, int(rng.integers(2**31)))
        episodes.append(Episode(workload, clusters[choice], predicted, scenario))
    return episodes


def mix_episodes(scenarios: Sequence[Scenario], count: int, seed: int) -> list[Episode]:
    """Episodes of several scenarios in turn, `count` in all; each scenario's are those of `make_episodes`.

    Raises:
        InputError: as `make_episodes`.
    """
    share = -(-count // len(scenarios))
    drawn = [make_episodes(scenario, share, seed) for scenario in scenarios]
    return [episode for turn in zip(*drawn, strict=True) for episode in turn][:count]


def fleets_of(scenario: Scenario) -> list[ClusterSpec]:
    """The fleets of a scenario with its levers.

    Raises:
        InputError: for a fleet that cannot be read, or an instance to drain that no fleet has.
    """
    fleets = []
    for text in scenario.clusters:
        fleet = parse_cluster(
            text,
            prefix_caching=scenario.prefix_caching,
            migration=scenario.migration,
            budget_period_s=scenario.budget_period_s,
            **scenario.engine,
        )
        fleets.append(_drained(fleet, scenario.drain))
    most = max(len(fleet) for fleet in fleets)
    for fleet in fleets:
        if all(spec.drain_at_s is not None for spec in fleet.instances):
            hint = f"every instance of {fleet.name} drains; leave one that takes requests"
            raise InputError(f"scenario {scenario.name}", "drain", list(scenario.drain), hint)
    for number in scenario.drain:
        if int(number) >= most:
            hint = f"the largest fleet has instances 0..{most - 1}"
            raise InputError(f"scenario {scenario.name}", "drain", number, hint)
    return fleets


def _drained(fleet: ClusterSpec, drain: dict[str, float]) -> ClusterSpec:
    """The fleet with the times from which instances drain."""
    instances = [
        replace(spec, drain_at_s=drain[str(i)]) if str(i) in drain else spec
        for i, spec in enumerate(fleet.instances)
    ]
    return replace(fleet, instances=tuple(instances))


def sample_workload(scenario: Scenario) -> Workload:
    """The requests on which `make_episodes` measures a fleet's saturation.

    Raises:
        InputError: for a workload that is not there.
    """
    return _Source(scenario).sample


def _check_classes(scenario: Scenario, sample: Workload) -> None:
    names = tuple(scenario.classes) or sample.class_names
    for field in ("class_slo", "class_priority"):
        for name in getattr(scenario, field):
            if name not in names:
                hint = f"the workload's classes are {', '.join(names)}"
                raise InputError(f"scenario {scenario.name}", field, name, hint)


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
        self._trace = self._load(SAMPLE_RATE_RPS)
        self._rate_rps = SAMPLE_RATE_RPS
        self.sample = head(self._trace, SAMPLE_REQUESTS)

    def draw(self, rate_rps: float, rng: np.random.Generator, k: int, windows: int) -> Workload:
        """The workload of episode k; the k-th of that many disjoint windows of a trace, unless 0."""
        scenario = self._scenario
        if self._trace is None:
            drawn = generate(
                scenario.workload, scenario.requests, rate_rps=rate_rps, seed=int(rng.integers(2**31))
            )
        else:
            drawn = self._cut(self._at(self._trace, rate_rps), rng, k, windows)
        if not (drawn.after >= 0).any():
            # The slow swings of a rate are longer than an episode: without this its load would be anything
            # from half to twice what was drawn. Think times of sessions are left as they are.
            drawn = scale_rate(drawn, rate_rps)
        if scenario.classes or scenario.priorities:
            levels = {int(level): share for level, share in scenario.priorities.items()}
            seed = int(rng.integers(2**31))
            drawn = assign(drawn, classes=scenario.classes or None, priorities=levels or None, seed=seed)
        return prioritise(drawn, scenario.class_priority) if scenario.class_priority else drawn

    def _load(self, rate_rps: float) -> Workload:
        scenario = self._scenario
        return load(scenario.workload, rate_rps=rate_rps, seed=SAMPLE_SEED, zero_output=scenario.zero_output)

    def _at(self, trace: Workload, rate_rps: float) -> Workload:
        """The trace at a rate: a higher one means more sessions at a time, not faster people."""
        if (trace.after >= 0).any() and rate_rps != self._rate_rps:
            self._trace, self._rate_rps = self._load(rate_rps), rate_rps
            return self._trace
        return trace

    def _cut(self, trace: Workload, rng: np.random.Generator, k: int, windows: int) -> Workload:
        requests = min(self._scenario.requests, len(trace) // max(windows, 1))
        if windows:
            if len(trace) < windows * LEAST_WINDOW:
                hint = f"{windows} disjoint windows need {LEAST_WINDOW} requests each; use fewer seeds"
                raise InputError(trace.name, "requests", len(trace), hint)
            return slice_rows(trace, k * requests, requests)
        return slice_rows(trace, int(rng.integers(len(trace) - requests + 1)), requests)
