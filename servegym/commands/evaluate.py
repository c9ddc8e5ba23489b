"""`servegym evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import tyro
from rich.console import Console
from rich.live import Live
from rich.text import Text

from servegym.agents.heuristics import heuristic_names, make_heuristic, search_space
from servegym.agents.heuristics.tuning import Parameters, tune
from servegym.agents.policy import Policy
from servegym.agents.search.lookahead import Lookahead
from servegym.envs.cluster.decisions import ENVIRONMENTS
from servegym.envs.cluster.schema import schema_hash
from servegym.envs.scenario import Scenario, load_scenario
from servegym.envs.workloads import DEFAULT_WORKLOAD
from servegym.errors import InputError
from servegym.evaluation import (
    Setting,
    Table,
    as_json,
    compare,
    decisions_of,
    episodes_of,
    load_of,
    measure,
    three_loads,
)
from servegym.files import check_folder, command_line, console, git_revision, trace_hashes, write_json
from servegym.flags import DEFAULT_SCENARIO, Setup, check_environment, check_seed
from servegym.loading import load_agent
from servegym.report import plot, render

# Behind an answer of look-ahead: rules, and how long they meet arrivals.
BEHIND = ({"dispatch": "lmetric"}, {"dispatch": "lmetric", "migrate": "llumnix"})
HORIZON_S = 10.0
# The recorded trace wins over the generator that was fitted to it, for the default workload only.
RECORDED = Path("../shared/traces/eval") / f"{DEFAULT_WORKLOAD}.parquet"


Tuned: TypeAlias = "dict[str, dict[str, Parameters]]"  # fleet -> heuristic -> its parameters


@dataclass(frozen=True)
class Result:
    """What was found in one scenario.

    Attributes:
        scenario: what was played.
        tables: one a fleet and load.
        tuned: the heuristics' parameters.
        training: what they were tuned on; None: they were not.
    """

    scenario: Scenario
    tables: list[Table]
    tuned: Tuned
    training: Scenario | None


@dataclass(kw_only=True)
class Command(Setup):
    """Play trained policies and heuristics on the same requests and show what became of them.

    Prints a table for each scenario, fleet and rate, best goodput first, and writes results.json and plots.
    Every policy meets the same requests, prediction errors and noise; intervals are 95% over the seeds. A
    policy answers the questions that it was made for; built-in rules answer the others.

    `evaluate zoo` plays the shipped policies again and holds them to their cards.
    """

    trained_agent: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(aliases=("-i",))] = ()
    """Checkpoint or bundle folder; repeat for several."""
    env: str | None = None
    """Refuse agents that are not for this environment; each knows its own."""
    policies: tuple[str, ...] = ()
    """Heuristics to compare with (see `servegym heuristics`); by default all of use in the scenario."""
    loads: tuple[float, ...] = ()
    """Offered loads as fractions of the fleet's saturation throughput on the workload; by default three from
    the scenario's lowest to its highest."""
    rates: tuple[float, ...] = ()
    """Offered loads in requests/s instead."""
    seeds: int = 5
    """Episodes for each table; each has its own requests (of a trace a window that shares none with the
    others), prediction errors and noise."""
    seed: int = 0
    """The first seed."""
    tune: bool = False
    """First tune every heuristic that has parameters, for each fleet at its highest load: grid search by
    goodput, at most 30 candidates, on other episodes of the scenario's generator."""
    lookahead: int = 0
    """Play clairvoyant look-ahead too, which tries so many answers of each question on the true future, with
    the rules `lmetric` and `llumnix` behind them: a bound, not a competitor. 0: not. It takes minutes."""
    num_threads: int = 2
    """Episodes that run at the same time."""
    log_folder: Annotated[str, tyro.conf.arg(aliases=("-f",))] = "runs/evaluate"
    """Where results.json and the plots go."""

    def run(self) -> int:
        """Evaluate, print, write."""
        check_folder(self.log_folder)
        check_environment("evaluate", self.env or next(iter(ENVIRONMENTS)))
        scenarios = self._scenarios()
        for name in self.policies:
            make_heuristic(name)
        if self.lookahead < 0:
            raise InputError("evaluate", "lookahead", self.lookahead, "give a number of answers, or 0")
        learned = [load_agent(path, self.env) for path in self.trained_agent]
        prepared = [
            (s, self._settings(s), self._training(s, name) if self.tune else None)
            for s, name in zip(scenarios, self.scenario or (DEFAULT_SCENARIO,), strict=True)
        ]
        results = []
        for scenario, settings, training in prepared:
            names = self.policies or heuristic_names(decisions_of(scenario))
            tables, tuned = self._play(names, learned, scenario, settings, training)
            results.append(Result(scenario, tables, tuned, training))
            _show(results[-1])
        self._write(results)
        return 0

    def _scenarios(self) -> list[Scenario]:
        for name in ("seeds", "num_threads"):
            if getattr(self, name) < 1:
                raise InputError("evaluate", name, getattr(self, name), "must be at least 1")
        check_seed("evaluate", self.seed)
        recorded = self.workload is None and RECORDED.is_file()
        return [
            replace(s, workload=str(RECORDED)) if recorded and s.workload == DEFAULT_WORKLOAD else s
            for s in self.resolve()
        ]

    def _training(self, scenario: Scenario, name: str) -> Scenario:
        """What heuristics are tuned on: never the windows of a trace that the comparison plays."""
        workload = scenario.workload
        if Path(workload).is_file():
            workload = load_scenario(name).workload
        if Path(workload).is_file():
            hint = f"scenario {name} has no generator to tune on; name one that has"
            raise InputError("evaluate", "tune", workload, hint)
        return replace(scenario, workload=workload)

    def _settings(self, scenario: Scenario) -> list[Setting]:
        for name in ("loads", "rates"):
            for value in getattr(self, name):
                if not 0 < value < float("inf"):
                    raise InputError("evaluate", name, value, "must be finite and > 0")
        loads = self.loads or three_loads(scenario)
        return [
            Setting(cluster, load)
            for cluster in scenario.clusters
            for load in ([load_of(scenario, cluster, rate) for rate in self.rates] or loads)
        ]

    def _play(
        self,
        names: Sequence[str],
        learned: Sequence[Policy],
        scenario: Scenario,
        settings: list[Setting],
        training: Scenario | None,
    ) -> tuple[list[Table], Tuned]:
        """The tables, and the parameters that were tuned for each fleet."""
        tables: list[Table] = []
        tuned: Tuned = {}
        with Live(console=Console(stderr=True), transient=True, refresh_per_second=4) as live:

            def progress(text: str) -> None:
                live.update(Text(text))

            for cluster in dict.fromkeys(setting.cluster for setting in settings):
                own = [setting for setting in settings if setting.cluster == cluster]
                if training is not None:
                    highest = max(own, key=lambda setting: setting.load)
                    tuned[cluster] = self._tune(names, training, highest, progress)
                chosen = tuned.get(cluster, {})
                tables += compare(
                    [make_heuristic(name, **chosen.get(name, {})) for name in names] + self._clairvoyant(),
                    learned,
                    scenario,
                    own,
                    seeds=self.seeds,
                    seed=self.seed,
                    num_threads=self.num_threads,
                    progress=progress,
                )
        return tables, tuned

    def _clairvoyant(self) -> list[Policy]:
        """Look-ahead with a budget, where it was asked for."""
        return [Lookahead(behind=BEHIND, horizon_s=HORIZON_S, width=self.lookahead)] if self.lookahead else []

    def _tune(
        self, names: Sequence[str], training: Scenario, setting: Setting, progress: Callable[[str], None]
    ) -> dict[str, Parameters]:
        seed = (self.seed + 2**30) % 2**31  # of no episode that the comparison plays
        episodes = episodes_of(training, setting, self.seeds, seed)

        def goodput(rule: Policy) -> float:
            progress(f"{setting.cluster} at load {setting.load:.2f}: tuning {rule.name}")
            row = measure(rule, training, episodes, num_threads=self.num_threads, seed=seed)
            return row.interval("goodput").mean

        return {name: tune(name, goodput, seed) for name in names if search_space(name)}

    def _write(self, results: list[Result]) -> None:
        folder = Path(self.log_folder)
        tables = [table for result in results for table in result.tables]
        write_json(
            folder / "results.json",
            {
                "command": command_line(),
                "revision": git_revision(),
                "schema": schema_hash(),
                "scenarios": [_facts(result) for result in results],
                "seeds": self.seeds,
                "seed": self.seed,
                "tables": as_json(tables),
            },
        )
        try:
            plots = plot(tables, folder)
        except ImportError:
            console().print("no plots: pip install 'servegym[plots]'")
            plots = []
        console().print("written:", *(str(p) for p in [folder / "results.json", *plots]))


def _facts(result: Result) -> dict[str, Any]:
    training = result.training
    return {
        "scenario": asdict(result.scenario),
        "traces": trace_hashes(result.scenario.workload),
        "tuning": training and {"workload": training.workload, "parameters": result.tuned},
    }


def _show(result: Result) -> None:
    out = console()
    out.print(_heading(result.scenario), highlight=False)
    for table in result.tables:
        out.print()
        out.print(render(table, out.width))
    out.print(_footnote(result.tuned, result.training), highlight=False, markup=False)


def _footnote(tuned: Tuned, training: Scenario | None) -> str:
    if training is None:
        return "heuristics: published parameters, untuned"
    lines = [f"heuristics: tuned on {training.workload}, other episodes, at each fleet's highest load"]
    for cluster, chosen in tuned.items():
        rules = (f"{name} ({', '.join(f'{k}={v}' for k, v in p.items())})" for name, p in chosen.items())
        lines.append(f"  {cluster}: {'; '.join(rules)}")
    return "\n".join(lines)


def _heading(scenario: Scenario) -> str:
    recorded = Path(scenario.workload).is_file()
    kind = "recorded trace, a disjoint window for each seed" if recorded else "embedded generator"
    slo = f"TTFT <= {scenario.slo.ttft_s:g} s, TPOT <= {scenario.slo.tpot_s * 1e3:g} ms"
    return f"scenario {scenario.name}; workload: {scenario.workload} ({kind}); SLO: {slo}"
