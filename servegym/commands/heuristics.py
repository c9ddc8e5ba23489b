"""`servegym heuristics`."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass

from rich.table import Table

from servegym.agents.heuristics import heuristic_names, make_heuristic
from servegym.files import console


@dataclass
class Command:
    """List the heuristics with what they do and where they were published."""

    def run(self) -> int:
        """Print one row a heuristic; the text is the docstring of its module."""
        table = Table("heuristic", "rule and source", show_lines=True)
        for name in heuristic_names():
            rule = make_heuristic(name)
            mark = "\n(reads the future)" if rule.needs_oracle else ""
            table.add_row(name + mark, inspect.getdoc(sys.modules[type(rule).__module__]) or "")
        console().print(table)
        return 0
