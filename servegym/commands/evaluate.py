"""`servegym evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.live import Live
from rich.text import Text

from servegym.agents.heuristics import heuristic_names, make_heuristic
from servegym.agents.policy import Policy
from servegym.envs.cluster.schema import schema_hash
from servegym.envs.scenario import Scenario
from servegym.errors import InputError
from servegym.evaluation import Setting, Table, as_json, compare, load_of
from servegym.files import check_folder, command_line, console, git_revision, trace_hashes, write_json
from servegym.flags import Setup
from servegym.loading import load_agent
from servegym.report import plot, render

TRACES = Path("../shared/traces/eval")  # recorded traces win over the generators that were fitted to them


@dataclass(kw_only=True)
class Command(Setup):
    """Play trained policies and heuristics on the same requests and show what became of them.

    Prints a table for each fleet and rate, best goodput first, and writes results.json and plots. Every
    policy meets the same requests, prediction errors and noise; intervals are 95% over the seeds.
    """

    trained_agent: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(aliases=("-i",))] = ()
    """Checkpoint or bundle folder; repeat for several."""
    policies: tuple[str, ...] = ()
    """Heuristics to compare with (see `servegym heuristics`); all by default."""
    loads: tuple[float, ...] = (0.6, 0.8, 1.0)
    """Offered loads as fractions of the fleet's saturation throughput on the workload."""
    rates: tuple[float, ...] = ()
    """Offered loads in requests/s instead."""
    seeds: int = 5
    """Episodes for each table; each draws its own window, prediction errors and noise."""
    seed: int = 0
    """The first seed."""
    num_threads: int = 2
    """Episodes that run at the same time."""
    log_folder: Annotated[str, tyro.conf.arg(aliases=("-f",))] = "runs/evaluate"
    """Where results.json and the plots go."""

    def run(self) -> int:
        """Evaluate, print, write."""
        check_folder(self.log_folder)
        scenario = self._scenario()
        heuristics = [make_heuristic(name) for name in self.policies or heuristic_names()]
        learned = [load_agent(path) for path in self.trained_agent]
        settings = self._settings(scenario)
        out = console()
        out.print(_heading(scenario), highlight=False)
        tables = self._play(heuristics, learned, scenario, settings)
        for table in tables:
            out.print()
            out.print(render(table))
        self._write(tables, scenario)
        return 0

    def _scenario(self) -> Scenario:
        for name in ("seeds", "num_threads"):
            if getattr(self, name) < 1:
                raise InputError("evaluate", name, getattr(self, name), "must be at least 1")
        scenario = self.resolve()
        recorded = TRACES / f"{scenario.workload}.parquet"
        return (
            replace(scenario, workload=str(recorded))
            if self.workload is None and recorded.is_file()
            else scenario
        )

    def _settings(self, scenario: Scenario) -> list[Setting]:
        for name in ("loads", "rates"):
            for value in getattr(self, name):
                if not 0 < value < float("inf"):
                    raise InputError("evaluate", name, value, "must be finite and > 0")
        return [
            Setting(cluster, load)
            for cluster in scenario.clusters
            for load in ([load_of(scenario, cluster, rate) for rate in self.rates] or self.loads)
        ]

    def _play(
        self,
        heuristics: Sequence[Policy],
        learned: Sequence[Policy],
        scenario: Scenario,
        settings: list[Setting],
    ) -> list[Table]:
        with Live(console=Console(stderr=True), transient=True, refresh_per_second=4) as live:
            return compare(
                heuristics,
                learned,
                scenario,
                settings,
                seeds=self.seeds,
                seed=self.seed,
                num_threads=self.num_threads,
                progress=lambda text: live.update(Text(text)),
            )

    def _write(self, tables: list[Table], scenario: Scenario) -> None:
        folder = Path(self.log_folder)
        write_json(
            folder / "results.json",
            {
                "command": command_line(),
                "revision": git_revision(),
                "schema": schema_hash(),
                "scenario": asdict(scenario),
                "traces": trace_hashes(scenario.workload),
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


def _heading(scenario: Scenario) -> str:
    kind = "recorded trace" if Path(scenario.workload).is_file() else "embedded generator"
    slo = f"TTFT <= {scenario.slo.ttft_s:g} s, TPOT <= {scenario.slo.tpot_s * 1e3:g} ms"
    return f"workload: {scenario.workload} ({kind}); {scenario.requests} requests an episode; SLO: {slo}"
