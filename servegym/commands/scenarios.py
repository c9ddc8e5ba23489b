"""`servegym scenarios`."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from servegym.envs.scenario import load_scenario, scenario_names
from servegym.files import console


@dataclass
class Command:
    """List the scenarios that ship with the package; `--scenario` also takes a TOML file."""

    def run(self) -> int:
        """Print one row a scenario."""
        table = Table("scenario", "workload", "fleets", "loads", "reward", "what it is")
        for name in scenario_names():
            s = load_scenario(name)
            loads = f"{s.loads[0]:g} to {s.loads[1]:g}"
            table.add_row(name, s.workload, "\n".join(s.clusters), loads, s.reward, s.description)
        console().print(table)
        return 0
