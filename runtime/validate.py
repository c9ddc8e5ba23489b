"""The same requests and policies on real engines and in the cluster model: measured | predicted | error.

Every policy plays the workload in real time, several times and in random order, so that drift of the machine
hits all alike. The model plays the very same requests once. What differs between two plays of one policy is
the machine's own spread: no prediction can be held to less.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from scipy import stats

from servegym.agents.play import play
from servegym.agents.policy import Policy
from servegym.envs.cluster.capacity import saturation_rps
from servegym.envs.cluster.episode import Episode
from servegym.envs.cluster.spec import ClusterSpec
from servegym.envs.metrics import class_slos, summarize
from servegym.envs.records import Records
from servegym.envs.scenario import Scenario
from servegym.envs.workloads import generate, load
from servegym.envs.workloads.generators import GENERATORS
from servegym.envs.workloads.predict import predicted_output_tokens
from servegym.envs.workloads.transforms import head, scale_lengths, scale_rate

FIGURES = tuple(f"{name}_{part}_s" for name in ("ttft", "tpot", "e2e") for part in ("p50", "p99"))
RANKED = ("e2e_mean_s", *FIGURES)  # policies are ranked by each of these


class Player(Protocol):
    """Real engines on which a policy is played in real time.

    Attributes:
        counts: decisions of the last play by `answered` and, for those that the fallback took, the reason.
    """

    counts: dict[str, int]

    def play(self, policy: Policy, scenario: Scenario, episode: Episode, seed: int = 0) -> Records:
        """What became of the episode's requests, one row each, on the workload's clock.

        Arguments mean what they mean to `servegym.agents.play.play`. Every request gets exactly its
        `output_tokens` tokens.
        """
        ...

    def close(self) -> None:
        """Stop the engines."""


@dataclass(frozen=True)
class Comparison:
    """One policy in both worlds.

    Attributes:
        policy: its name.
        measured: metric of `servegym.envs.metrics.METRICS` -> float64 [repeats].
        predicted: metric -> what the model says.
        decisions: of all plays, by `answered` and the reason for a fallback.
    """

    policy: str
    measured: dict[str, np.ndarray]
    predicted: dict[str, float]
    decisions: dict[str, int] = field(default_factory=dict)

    def typical(self, metric: str) -> float:
        """The median over the repeats."""
        return float(np.median(self.measured[metric]))

    def error(self, metric: str) -> float:
        """Signed error of the prediction, percent of what was measured."""
        return 100 * (self.predicted[metric] / self.typical(metric) - 1)

    def spread(self, metric: str) -> float:
        """How far the repeats lie apart, percent of their median; NaN for a single one."""
        values = self.measured[metric]
        return 100 * float(np.ptp(values)) / self.typical(metric) if len(values) > 1 else float("nan")


@dataclass(frozen=True)
class Validation:
    """All policies on one episode.

    Attributes:
        comparisons: one a policy, in the order in which they were given.
        rate_rps, requests: of the workload.
    """

    comparisons: tuple[Comparison, ...]
    rate_rps: float
    requests: int

    def largest_error(self) -> float:
        """The largest error of a figure over the policies, percent."""
        return max(abs(c.error(figure)) for c in self.comparisons for figure in FIGURES)

    def largest_spread(self) -> float:
        """The largest spread of a figure over the policies, percent."""
        return max(c.spread(figure) for c in self.comparisons for figure in FIGURES)

    def agreement(self, metric: str) -> dict[str, float]:
        """Rank correlation of the policies by a metric between both worlds; NaN where all are equal."""
        measured = [c.typical(metric) for c in self.comparisons]
        return rank_correlation(measured, [c.predicted[metric] for c in self.comparisons])

    def repeatability(self, metric: str) -> dict[str, float]:
        """Rank correlation of the policies between the first and the last repeat; NaN for a single one."""
        if len(self.comparisons[0].measured[metric]) < 2:
            return {"spearman": float("nan"), "kendall": float("nan")}
        first, last = ([c.measured[metric][k] for c in self.comparisons] for k in (0, -1))
        return rank_correlation(first, last)


def validate(
    player: Player,
    policies: Sequence[Policy],
    scenario: Scenario,
    episode: Episode,
    *,
    repeats: int = 2,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Validation:
    """Play every policy `repeats` times on the engines and once in the model.

    Args:
        player: the engines.
        policies: what to compare; each answers the questions that it is for.
        scenario: service levels and what the router sees.
        episode: requests and fleet, the same for all.
        repeats: plays of each policy on the engines.
        seed: of the policies, the same in both worlds, and of the order of the plays.
        progress: told what runs next.

    Raises:
        InputError: what either world refuses.
        RuntimeError: for a request that the engines lost or answered with another number of tokens.
    """
    # The model first: what it refuses, it refuses before minutes of play.
    predicted = [predict(p, scenario, episode, seed) for p in policies]
    measured: list[list[dict[str, float]]] = [[] for _ in policies]
    decisions: list[Counter[str]] = [Counter() for _ in policies]
    rng = np.random.default_rng(seed)
    for k in range(repeats):
        for i in rng.permutation(len(policies)):
            progress(f"repeat {k + 1} of {repeats}: {policies[i].name}")
            measured[i].append(measure(player, policies[i], scenario, episode, seed))
            decisions[i].update(player.counts)
    comparisons = tuple(
        Comparison(p.name, {name: np.array([run[name] for run in runs]) for name in said}, said, dict(asked))
        for p, runs, said, asked in zip(policies, measured, predicted, decisions, strict=True)
    )
    return Validation(comparisons, episode.workload.rate_rps, len(episode.workload))


def measure(
    player: Player, policy: Policy, scenario: Scenario, episode: Episode, seed: int = 0
) -> dict[str, float]:
    """Metrics of one play on the engines.

    Raises:
        RuntimeError: for a request that the engines lost or answered with another number of tokens.
    """
    records = player.play(policy, scenario, episode, seed)
    _check_complete(records, episode, policy.name)
    return _metrics(records, episode, scenario)


def predict(policy: Policy, scenario: Scenario, episode: Episode, seed: int = 0) -> dict[str, float]:
    """The same in the model."""
    return _metrics(play(policy, scenario, [episode], 1, seed)[0], episode, scenario)


def make_episode(
    fleet: ClusterSpec,
    trace: str,
    scenario: Scenario,
    *,
    requests: int,
    load_fraction: float,
    length_scale: float = 1.0,
    seed: int = 0,
) -> Episode:
    """Requests of a trace or generator, scaled to what the machine can do.

    Args:
        fleet: the engines.
        trace: a generator's name or a trace's path; of a trace the first requests are taken.
        scenario: error of the length predictions, and what to do with requests without output.
        requests: how many.
        load_fraction: arrival rate as a fraction of the fleet's saturation in the model.
        length_scale: factor of all prompt and output lengths.
        seed: of a generator, and of the length predictions.

    Raises:
        InputError: for a workload that is not there, or that the fleet cannot serve.
    """
    if trace.split(":")[0] in GENERATORS:
        workload = generate(trace, requests, seed=seed)
    else:
        whole = load(trace, rate_rps=1.0, seed=seed, zero_output=scenario.zero_output)
        workload = head(whole, requests)
    if length_scale != 1.0:
        workload = scale_lengths(workload, length_scale)
    workload = scale_rate(workload, load_fraction * saturation_rps(fleet, workload))
    predicted = predicted_output_tokens(workload, scenario.prediction_error, seed)
    return Episode(workload, fleet, predicted, scenario)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """Spearman's rho and Kendall's tau-b; NaN for fewer than two or all equal values."""
    if min(len(set(first)), len(set(second))) < 2:
        return {"spearman": float("nan"), "kendall": float("nan")}
    return {
        "spearman": float(stats.spearmanr(first, second).statistic),
        "kendall": float(stats.kendalltau(first, second).statistic),
    }


def as_json(validation: Validation) -> dict[str, Any]:
    """Plain data; JSON has no NaN."""
    return {
        "requests": validation.requests,
        "rate_rps": _number(validation.rate_rps),
        "largest_error_percent": _number(validation.largest_error()),
        "largest_spread_percent": _number(validation.largest_spread()),
        "rank_correlation": {m: _numbers(validation.agreement(m)) for m in RANKED},
        "repeatability": {m: _numbers(validation.repeatability(m)) for m in RANKED},
        "policies": [
            {
                "policy": c.policy,
                "decisions": c.decisions,
                "metrics": {
                    name: {
                        "measured": [_number(value) for value in values],
                        "predicted": _number(c.predicted[name]),
                    }
                    for name, values in c.measured.items()
                },
                "error_percent": {figure: _number(c.error(figure)) for figure in FIGURES},
                "spread_percent": {figure: _number(c.spread(figure)) for figure in FIGURES},
            }
            for c in validation.comparisons
        ],
    }


def _metrics(records: Records, episode: Episode, scenario: Scenario) -> dict[str, float]:
    levels = class_slos(episode.workload.class_names, scenario.slo, scenario.class_slo)
    return summarize(records, levels)


def _check_complete(records: Records, episode: Episode, policy: str) -> None:
    """Figures of a run that lost requests would flatter it."""
    lost = int((~np.isfinite(records.finished_s)).sum())
    wrong = int((records.output_tokens != episode.workload.output_tokens).sum())
    if len(records) != len(episode.workload) or lost or wrong:
        raise RuntimeError(f"{policy}: {len(records)} records, {lost} unfinished, {wrong} of another length")


def _numbers(values: dict[str, float]) -> dict[str, float | None]:
    return {name: _number(value) for name, value in values.items()}


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if np.isfinite(value) else None
