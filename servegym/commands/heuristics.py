"""`servegym heuristics`."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from servegym.agents.heuristics import describe, heuristic_names, make_heuristic
from servegym.files import console, folded


@dataclass
class Command:
    """List the heuristics with what they do and where they were published."""

    def run(self) -> int:
        """Print one row a heuristic; the text is its module's docstring."""
        table = Table(show_lines=True)
        table.add_column("heuristic", no_wrap=True)
        table.add_column("answers")
        table.add_column("rule and source")
        for name in heuristic_names():
            rule = make_heuristic(name)
            mark = "\n(reads the future)" if rule.needs_oracle else ""
            table.add_row(folded(name) + mark, ", ".join(rule.kinds), describe(name))
        console().print(table)
        return 0
