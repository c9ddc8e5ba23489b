"""What a training run adds to PPO: evaluation while it goes on, and the card at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from stable_baselines3.common.callbacks import BaseCallback

from servegym.agents.heuristics import heuristic_names, make_heuristic
from servegym.agents.ppo import NetworkPolicy
from servegym.envs.cluster.episode import make_episodes
from servegym.envs.cluster.schema import schema_hash
from servegym.envs.metrics import Interval
from servegym.envs.scenario import Scenario
from servegym.evaluation import Row, Setting, Table, compare, measure

if TYPE_CHECKING:
    from servegym.agents.ppo import PPO

LOGGED = ("goodput", "ttft_mean_s", "ttft_p99_s", "tpot_p99_s", "e2e_mean_s", "e2e_p99_s", "preemptions")
COLUMNS = {"ttft_mean_s": 1.0, "ttft_p99_s": 1.0, "tpot_p99_s": 1e3, "e2e_mean_s": 1.0, "e2e_p99_s": 1.0}
EVAL_SEED = 1_000_003  # far from training seeds, the same for every run of a scenario


class EvaluationCallback(BaseCallback):
    """Plays fixed episodes with the network's favourite answers and logs `eval/*`.

    Args:
        scenario: what is played.
        every: decisions between two evaluations, at least; 0 never evaluates.
        episodes: how many.
        num_threads: episodes that run at the same time.
    """

    def __init__(self, scenario: Scenario, every: int, episodes: int, num_threads: int) -> None:
        super().__init__()
        self._scenario, self._every, self._num_threads = scenario, every, num_threads
        # Always: here it turns out whether the workload is enough for the comparison at the end, too.
        self._episodes = make_episodes(scenario, episodes, EVAL_SEED, disjoint=True)
        self._evaluated_at = 0

    def _on_training_start(self) -> None:
        self._evaluated_at = self.model.num_timesteps

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if not self._every or self.model.num_timesteps - self._evaluated_at < self._every:
            return
        self._evaluated_at = self.model.num_timesteps
        policy = NetworkPolicy(cast("PPO", self.model).network)
        row = measure(policy, self._scenario, self._episodes, num_threads=self._num_threads)
        for name in LOGGED:
            self.logger.record(f"eval/{name}", row.interval(name).mean)


def final_tables(policy: NetworkPolicy, scenario: Scenario, seeds: int, num_threads: int) -> list[Table]:
    """The trained policy beside every heuristic on each fleet of its scenario, at its highest load."""
    settings = [Setting(cluster, scenario.loads[1]) for cluster in scenario.clusters]
    heuristics = [make_heuristic(name) for name in heuristic_names(["dispatch"])]
    return compare(
        heuristics, [policy], scenario, settings, seeds=seeds, seed=EVAL_SEED, num_threads=num_threads
    )


def card(name: str, facts: Mapping[str, Any], scenario: Scenario, tables: Sequence[Table]) -> str:
    """The model card, README.md of a checkpoint.

    Args:
        name: of the policy.
        facts: command, revision, seed, decisions, decision_us, instances, parameters.
        scenario: what it was trained on.
        tables: results beside the heuristics, may be empty while training goes on.
    """
    lines = [
        f"# {name}",
        "",
        f"A dispatch policy for the scenario `{scenario.name}`: {scenario.description or 'custom'}.",
        "",
        f"- trained by: `{facts['command']}`",
        f"- code revision: {facts['revision'] or 'unknown'}",
        f"- seed: {facts['seed']}; decisions: {facts['decisions']:,}; parameters: {facts['parameters']:,}",
        f"- workload: {scenario.workload}; reward: {scenario.reward}",
        f"- loads: {scenario.loads[0]:g} to {scenario.loads[1]:g} of saturation",
        f"- fleets: {', '.join(scenario.clusters)}",
        f"- observation schema: `{schema_hash()}`",
        f"- one decision among {facts['instances']} instances: {facts['decision_us']} us "
        "(torch, one lane, median); `servegym export` measures ONNX Runtime",
    ]
    return "\n".join([*lines, *(line for table in tables for line in _section(table)), ""])


def _section(table: Table) -> list[str]:
    seeds = len(table.rows[0].samples["goodput"])
    best = table.best_heuristic
    return [
        "",
        f"## {table.setting.cluster} at {table.rate_rps:.1f} requests/s",
        "",
        f"{table.setting.load:.0%} of saturation, {seeds} seeds of {table.requests:,} requests, "
        "the same for all, 95% intervals. "
        f"Δ: paired difference to `{best.policy}` in percentage points. † reads the future.",
        "",
        "| policy | goodput % | Δ | TTFT mean s | TTFT P99 s | TPOT P99 ms | E2E mean s | E2E P99 s |",
        "|---|---|---|---|---|---|---|---|",
        *(_line(row, best) for row in table.rows),
    ]


def _line(row: Row, best: Row) -> str:
    name = f"**{row.policy}**" if row.learned else row.policy + "†" * row.oracle
    gain = "" if row is best else _interval(row.against(best, "goodput"), 100, "+.2f")
    columns = [name, _interval(row.interval("goodput"), 100, ".2f"), gain]
    columns += [_interval(row.interval(metric), factor, ".3g") for metric, factor in COLUMNS.items()]
    return f"| {' | '.join(columns)} |"


def _interval(value: Interval, factor: float, form: str) -> str:
    return f"{value.mean * factor:{form}} ± {value.half_width * factor:{form.lstrip('+')}}"
