"""What a training run adds to PPO: evaluation while it goes on, and the card at its end."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from servegym.agents.heuristics import heuristic_names, make_heuristic
from servegym.agents.policy import Policy
from servegym.agents.ppo import NetworkPolicy
from servegym.agents.task import Task
from servegym.envs.cluster.episode import make_episodes
from servegym.envs.cluster.schema import schema_hash
from servegym.envs.metrics import Interval
from servegym.envs.scenario import Scenario
from servegym.evaluation import (
    Row,
    Setting,
    Table,
    compare,
    decisions_of,
    facts,
    measure,
    number,
    three_loads,
)

if TYPE_CHECKING:
    from servegym.agents.ppo import PPO

LOGGED = ("goodput", "ttft_mean_s", "ttft_p99_s", "tpot_p99_s", "e2e_mean_s", "e2e_p99_s", "preemptions")
COLUMNS = {"ttft_mean_s": 1.0, "ttft_p99_s": 1.0, "tpot_p99_s": 1e3, "e2e_mean_s": 1.0, "e2e_p99_s": 1.0}
EVAL_SEED = 1_000_003  # far from training seeds, the same for every run of a scenario


class EvaluationCallback(BaseCallback):
    """Plays fixed episodes with the network's favourite answers and logs `eval/*`, means over scenarios.

    Args:
        scenarios: what is played.
        every: decisions between two evaluations, at least; 0 never evaluates.
        episodes: how many of each scenario.
        num_threads: episodes that run at the same time.
    """

    def __init__(self, scenarios: Sequence[Scenario], every: int, episodes: int, num_threads: int) -> None:
        super().__init__()
        self._every, self._num_threads = every, num_threads
        # Always: here it turns out whether the workload is enough for the comparison at the end, too.
        self._played = [(s, make_episodes(s, episodes, EVAL_SEED, disjoint=True)) for s in scenarios]
        self._evaluated_at = 0

    def _on_training_start(self) -> None:
        self._evaluated_at = self.model.num_timesteps

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if not self._every or self.model.num_timesteps - self._evaluated_at < self._every:
            return
        self._evaluated_at = self.model.num_timesteps
        model = cast("PPO", self.model)
        policy = NetworkPolicy(model.network, task=model.task)
        rows = [measure(policy, s, episodes, num_threads=self._num_threads) for s, episodes in self._played]
        for name in LOGGED:
            self.logger.record(f"eval/{name}", float(np.mean([row.interval(name).mean for row in rows])))


def final_tables(
    policy: Policy,
    scenarios: Sequence[Scenario],
    seeds: int,
    num_threads: int,
    names: Collection[str] | None = None,
) -> list[Table]:
    """A trained policy beside heuristics on the middle fleet of each scenario, at three loads of its range.

    Args:
        policy: the trained one.
        scenarios: what is played.
        seeds: episodes of each table.
        num_threads: of the cluster model.
        names: only these heuristics, of all that answer something in a scenario; None: all of them.
    """
    tables = []
    for scenario in scenarios:
        cluster = scenario.clusters[len(scenario.clusters) // 2]
        settings = [Setting(cluster, load) for load in three_loads(scenario)]
        known = heuristic_names(decisions_of(scenario))
        heuristics = [make_heuristic(name) for name in known if names is None or name in names]
        tables += compare(
            heuristics, [policy], scenario, settings, seeds=seeds, seed=EVAL_SEED, num_threads=num_threads
        )
    return tables


def card(
    name: str, facts: Mapping[str, Any], task: Task, scenarios: Sequence[Scenario], tables: Sequence[Table]
) -> str:
    """The model card, README.md of a checkpoint.

    Args:
        name: of the policy.
        facts: command, revision, seed, decisions, decision_us, instances, parameters.
        task: what the policy answers.
        scenarios: what it was trained on.
        tables: results beside the heuristics, may be empty while training goes on.
    """
    rules = ", ".join(f"{kind} by `{rule}`" for kind, rule in task.rules.items())
    lines = [
        f"# {name}",
        "",
        f"A policy for `{task.env}`; it takes {_listed(task.decisions)}"
        + (f". The cluster model's built-in rules answered the rest: {rules}." if rules else "."),
        "",
        f"- trained by: `{facts['command']}`",
        "- tables below again, and whether they are the same: `python evaluate.py zoo`",
        f"- code revision: {facts['revision'] or 'unknown'}",
        f"- seed: {facts['seed']}; decisions: {facts['decisions']:,}; parameters: {facts['parameters']:,}",
        f"- reward: {scenarios[0].reward}; discount rate {scenarios[0].beta:g}/s",
        f"- observation schema: `{schema_hash()}`",
        f"- one decision among {facts['instances']} instances: {facts['decision_us']} us "
        "(torch, one lane, median); `servegym export` measures ONNX Runtime",
        "",
        "| scenario | workload | fleets | loads, of saturation | what it is |",
        "|---|---|---|---|---|",
        *(
            f"| `{s.name}` | {s.workload} | {', '.join(s.clusters)} | {s.loads[0]:g} to {s.loads[1]:g} "
            f"| {s.description or 'custom'} |"
            for s in scenarios
        ),
    ]
    return "\n".join([*lines, *(line for table in tables for line in _section(table)), ""])


def record(tables: Sequence[Table]) -> list[dict]:
    """The figures of a card as plain data: mean and half-width of its columns, a row for each policy."""
    return [facts(table) | {"policies": [_recorded(row) for row in table.rows]} for table in tables]


def _recorded(row: Row) -> dict[str, Any]:
    values = {name: row.interval(name) for name in ("goodput", *COLUMNS)}
    metrics = {name: [number(value.mean), number(value.half_width)] for name, value in values.items()}
    return {"policy": row.policy, "learned": row.learned, "metrics": metrics}


def metrics_text(about: Mapping[str, Any], tables: Sequence[Mapping[str, Any]]) -> str:
    """metrics.json: what is said about the run, then the tables of `record` with one line for each policy."""
    text = json.dumps(dict(about), indent=1, allow_nan=False).removesuffix("\n}")
    return f'{text},\n "tables": [{",".join(map(_table_text, tables))}]\n}}\n'


def _table_text(table: Mapping[str, Any]) -> str:
    head = json.dumps({name: value for name, value in table.items() if name != "policies"}, allow_nan=False)
    rows = ",\n   ".join(json.dumps(row, allow_nan=False) for row in table["policies"])
    return f'\n  {head.removesuffix("}")}, "policies": [\n   {rows}]}}'


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _section(table: Table) -> list[str]:
    seeds = len(table.rows[0].samples["goodput"])
    best = table.best_heuristic
    return [
        "",
        f"## {table.scenario}: {table.setting.cluster} at {table.rate_rps:.1f} requests/s",
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
    mean = f"{value.mean * factor:{form}}"
    if math.isnan(value.half_width):  # of a single episode
        return mean
    return f"{mean} ± {value.half_width * factor:{form.lstrip('+')}}"
