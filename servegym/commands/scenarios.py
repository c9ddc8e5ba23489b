"""`servegym scenarios`."""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.table import Table

from servegym.envs.scenario import Scenario, Slo, load_scenario, scenario_names
from servegym.files import console


@dataclass
class Command:
    """List the scenarios that ship with the package; `--scenario` also takes a TOML file."""

    def run(self) -> int:
        """Print one block a scenario."""
        table = Table("scenario", "what it is", box=box.SIMPLE_HEAD, show_lines=True)
        for name in scenario_names():
            scenario = load_scenario(name)
            facts = "\n".join(f"[bold]{title}[/bold] {fact}" for title, fact in _facts(scenario).items())
            table.add_row(name, f"{scenario.description}\n{facts}")
        console().print(table)
        return 0


def _facts(s: Scenario) -> dict[str, str]:
    """What sets a scenario apart, by title."""
    classes = ", ".join(f"{share:.0%} {name}" for name, share in s.classes.items())
    return {
        "workload": f"{s.workload}, {s.requests:,} requests an episode{classes and ', ' + classes}",
        "fleets": ", ".join(s.clusters),
        "loads": f"{s.loads[0]:g} to {s.loads[1]:g} of saturation",
        "SLO": "; ".join([_slo(s.slo), *(f"{name}: {_slo(slo)}" for name, slo in s.class_slo.items())]),
        "levers": ", ".join(_levers(s)) or "dispatch",
        "engine": ", ".join(f"{key} = {value}" for key, value in s.engine.items()) or "the profile's",
        "scrape": f"every {s.scrape_s:g} s" if s.scrape_s else "fresh at every decision",
    }


def _slo(slo: Slo) -> str:
    weight = "" if slo.weight == 1 else f", weight {slo.weight:g}"
    return f"TTFT {slo.ttft_s:g} s, TPOT {slo.tpot_s * 1e3:g} ms{weight}"


def _levers(s: Scenario) -> list[str]:
    """The levers beside dispatch and preemption by recompute, which every cluster has."""
    levers = ["dispatch", "preempt"]
    if s.engine.get("swap_gib"):
        levers[-1] += f" (swap to {s.engine['swap_gib']:g} GiB of host memory)"
    if s.migration is not None:
        levers.append(f"migrate every {s.migration.period_s:g} s")
    if s.budget_period_s:
        levers.append(f"budget every {s.budget_period_s:g} s")
    if s.drain:
        levers.append(f"drain of instance {', '.join(s.drain)}")
    return levers
