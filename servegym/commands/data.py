"""`servegym data`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import tyro
from rich.table import Table

from servegym.envs.workloads import Workload, catalogue, resolve
from servegym.files import NAME_WIDTH, console

QUANTILES = (0.1, 0.5, 0.9, 0.99, 1.0)


@dataclass
class Command:
    """List the embedded workloads and the public traces, or describe one of them."""

    workload: Annotated[str | None, tyro.conf.Positional] = None
    """Generator or trace file to describe."""
    requests: int | None = None
    """Most requests to look at; 10,000 of a generator and all of a trace by default."""
    rate: float | None = None
    """Requests/s; required for traces without a clock."""
    seed: int = 0
    """Seed of a generator's draws."""
    zero_output: str = "refuse"
    """A trace's requests without output, failures in most: refuse them or drop them."""

    def run(self) -> int:
        """Print one row a workload, or the statistics of one."""
        if self.workload is None:
            console().print(_listing())
            return 0
        w = resolve(
            self.workload,
            requests=self.requests,
            rate_rps=self.rate,
            seed=self.seed,
            zero_output=self.zero_output,
        )
        console().print(_summary(w), highlight=False)
        console().print(_quantiles(w))
        return 0


def _listing() -> Table:
    table = Table(show_lines=True)
    table.add_column("workload", overflow="fold", width=NAME_WIDTH)
    for header in ("what it is", "source", "licence", "how to get it"):
        table.add_column(header, overflow="fold")
    for entry in catalogue():
        table.add_row(entry.name, entry.about, entry.source, entry.license, entry.get)
    return table


def _summary(w: Workload) -> str:
    gaps = np.diff(w.arrived_at_s[w.after < 0])
    variation = gaps.std() / gaps.mean() if len(gaps) > 1 and gaps.mean() > 0 else float("nan")
    sessions = len(np.unique(w.session[w.session >= 0]))
    return (
        f"{w.name}: {len(w):,} requests at {w.rate_rps:.2f} requests/s, CV of gaps {variation:.2f}, "
        f"{sessions:,} sessions, {(w.after >= 0).mean():.0%} closed-loop, "
        f"{len(np.unique(w.prefix_ids)):,} prefix blocks, classes {', '.join(w.class_names)}"
    )


def _quantiles(w: Workload) -> Table:
    table = Table("column", *(f"P{100 * q:g}" for q in QUANTILES), "mean")
    for name, values in (("prompt tokens", w.prompt_tokens), ("output tokens", w.output_tokens)):
        table.add_row(name, *(f"{x:,.0f}" for x in np.quantile(values, QUANTILES)), f"{values.mean():,.0f}")
    return table
