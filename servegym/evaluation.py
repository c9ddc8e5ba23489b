"""Evaluation: policies x settings -> records -> metrics with intervals; functions without shared state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from servegym.agents.play import play
from servegym.agents.policy import Policy
from servegym.envs.cluster.capacity import saturation_rps
from servegym.envs.cluster.decisions import allowed_decisions
from servegym.envs.cluster.episode import Episode, fleets_of, make_episodes, sample_workload
from servegym.envs.cluster.spec import parse_cluster
from servegym.envs.metrics import METRICS, Interval, class_slos, interval, paired_difference, summarize
from servegym.envs.scenario import Scenario


@dataclass(frozen=True)
class Setting:
    """One table: a fleet at an offered load.

    Attributes:
        cluster: the fleet.
        load: offered load as a fraction of the fleet's saturation throughput on the workload.
    """

    cluster: str
    load: float


@dataclass(frozen=True)
class Row:
    """One policy in one setting; arrays have one entry a seed.

    Attributes:
        policy: its name.
        oracle: whether it reads what no deployment knows.
        learned: whether it is a checkpoint or a bundle.
        samples: metric name -> float64 [seeds].
    """

    policy: str
    oracle: bool
    learned: bool
    samples: dict[str, np.ndarray]

    def interval(self, metric: str) -> Interval:
        """Mean and 95% interval of a metric over the seeds."""
        return interval(self.samples[metric])

    def against(self, other: Row, metric: str) -> Interval:
        """Mean and 95% interval of the difference to another row, seed by seed."""
        return paired_difference(self.samples[metric], other.samples[metric])


@dataclass(frozen=True)
class Table:
    """All policies in one setting, best goodput first.

    Attributes:
        scenario: name of what surrounds the setting.
        setting: fleet and load.
        rate_rps: mean arrival rate over the seeds, requests/s.
        requests: requests of a seed's episode.
        rows: one a policy.
    """

    scenario: str
    setting: Setting
    rate_rps: float
    requests: int
    rows: tuple[Row, ...]

    @property
    def best_heuristic(self) -> Row:
        """The first row that is neither learned nor an oracle, else the first row."""
        return next((row for row in self.rows if not row.learned and not row.oracle), self.rows[0])


def episodes_of(scenario: Scenario, setting: Setting, seeds: int, seed: int) -> list[Episode]:
    """The episodes that every policy plays in a setting: common random numbers, disjoint parts of a trace."""
    fixed = replace(scenario, clusters=(setting.cluster,), loads=(setting.load, setting.load))
    return make_episodes(fixed, seeds, seed, disjoint=True)


def decisions_of(scenario: Scenario) -> tuple[str, ...]:
    """The decisions that a scenario's levers allow.

    Raises:
        InputError: for a fleet that cannot be read.
    """
    return allowed_decisions(fleets_of(scenario))


def three_loads(scenario: Scenario) -> list[float]:
    """The lowest, the middle and the highest load of a scenario."""
    low, high = scenario.loads
    return sorted({low, (low + high) / 2, high})


def load_of(scenario: Scenario, cluster: str, rate_rps: float) -> float:
    """Which load a rate in requests/s is on a fleet.

    Raises:
        InputError: for an unknown fleet or workload.
    """
    fleet = parse_cluster(cluster, prefix_caching=scenario.prefix_caching, **scenario.engine)
    return rate_rps / saturation_rps(fleet, sample_workload(scenario))


def measure(
    policy: Policy,
    scenario: Scenario,
    episodes: Sequence[Episode],
    *,
    learned: bool = False,
    num_threads: int = 2,
    seed: int = 0,
) -> Row:
    """Play one policy on all episodes, one lane each, and summarise its records."""
    return _measure_all(policy, scenario, [episodes], learned, num_threads, seed)[0]


def _measure_all(
    policy: Policy,
    scenario: Scenario,
    groups: Sequence[Sequence[Episode]],
    learned: bool,
    num_threads: int,
    seed: int,
) -> list[Row]:
    """A row for each group of episodes; all play at once: a policy answers many lanes as fast as few."""
    together = [episode for group in groups for episode in group]
    seeds = [seed + k for group in groups for k in range(len(group))]
    records = iter(play(policy, scenario, together, num_threads=num_threads, seed=seeds))
    rows = []
    for group in groups:
        found = [
            summarize(next(records), class_slos(e.workload.class_names, scenario.slo, scenario.class_slo))
            for e in group
        ]
        samples = {m.name: np.array([metrics[m.name] for metrics in found]) for m in METRICS}
        rows.append(Row(policy.name, policy.needs_oracle, learned, samples))
    return rows


def compare(
    heuristics: Iterable[Policy],
    learned: Iterable[Policy],
    scenario: Scenario,
    settings: Sequence[Setting],
    *,
    seeds: int = 5,
    seed: int = 0,
    num_threads: int = 2,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Table]:
    """One table a setting; within it every policy meets the same requests.

    Args:
        heuristics: policies to compare with.
        learned: checkpoints and bundles.
        scenario: what surrounds the settings: workload, SLO, staleness, episode length.
        settings: fleets and loads.
        seeds: episodes a setting; each has its own requests (of a trace a window that shares none with the
            others), prediction errors and noise.
        seed: of the first episode.
        num_threads: lanes that run at the same time.
        progress: told what runs next.
    """
    policies = [(p, False) for p in heuristics] + [(p, True) for p in learned]
    groups = [episodes_of(scenario, setting, seeds, seed) for setting in settings]
    rows = []
    for policy, is_learned in policies:
        progress(f"{scenario.name}: {policy.name}")
        rows.append(_measure_all(policy, scenario, groups, is_learned, num_threads, seed))
    tables = []
    for k, (setting, group) in enumerate(zip(settings, groups, strict=True)):
        rate = float(np.mean([e.workload.rate_rps for e in group]))
        found = sorted((row[k] for row in rows), key=_rank)
        tables.append(Table(scenario.name, setting, rate, len(group[0].workload), tuple(found)))
    return tables


def _rank(row: Row) -> tuple[float, float]:
    return -row.interval("goodput").mean, row.interval("e2e_mean_s").mean


def as_json(tables: Sequence[Table]) -> list[dict]:
    """Plain data: each metric with interval, paired difference to the best heuristic, and samples."""
    return [
        facts(table) | {"policies": [_row_json(row, table.best_heuristic) for row in table.rows]}
        for table in tables
    ]


def facts(table: Table) -> dict:
    """What a table is about, as plain data."""
    return {
        "scenario": table.scenario,
        "cluster": table.setting.cluster,
        "load": table.setting.load,
        "rate_rps": table.rate_rps,
        "requests": table.requests,
        "best_heuristic": table.best_heuristic.policy,
    }


def _row_json(row: Row, best: Row) -> dict:
    metrics: dict[str, dict] = {}
    for name, values in row.samples.items():
        own, gain = row.interval(name), row.against(best, name)
        metrics[name] = {
            "mean": number(own.mean),
            "half_width": number(own.half_width),
            "against_best": number(gain.mean),
            "against_best_half_width": number(gain.half_width),
            "samples": [number(v) for v in values],
        }
    return {"policy": row.policy, "oracle": row.oracle, "learned": row.learned, "metrics": metrics}


def number(value: float) -> float | None:
    """Six significant digits; JSON has no NaN."""
    return float(f"{value:.6g}") if np.isfinite(value) else None
