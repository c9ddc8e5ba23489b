"""What evaluation shows: a table a setting, and plots over the load."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table as RichTable

from servegym.envs.metrics import Interval
from servegym.evaluation import Row, Table

_LATENCIES = (("TTFT", "ttft", 1.0, "s"), ("TPOT", "tpot", 1e3, "ms"), ("E2E", "e2e", 1.0, "s"))


def render(table: Table) -> RichTable:
    """A rich table of at most 160 characters; `±` is the half-width of a 95% interval over the seeds."""
    best = table.best_heuristic
    seeds = len(best.samples["goodput"])
    setting = table.setting
    out = RichTable(
        title=f"{table.scenario}: {setting.cluster} at {table.rate_rps:.2f} requests/s "
        f"({setting.load:.0%} of saturation), {seeds} seeds of {table.requests:,} requests",
        caption=f"Δ: paired difference in goodput to {best.policy}, percentage points; * trained; "
        "† reads the future; preempt: preemptions per 1000 requests; open: unfinished requests; "
        "±: 95% intervals, of the other columns (P50, preemptions, cache hits, open) in results.json",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title_justify="left",
        caption_justify="left",
    )
    out.add_column("policy", overflow="fold", max_width=24)  # systems of several rules have long names
    for header in ("goodput %", "Δ best"):
        out.add_column(header, justify="right", no_wrap=True)
    for label, _, _, unit in _LATENCIES:
        for statistic in ("mean", "P50", "P99"):
            out.add_column(f"{label}\n{statistic} {unit}", justify="right", no_wrap=True)
    for header in ("pre-\nempt", "cache\nhits %", "open"):
        out.add_column(header, justify="right", no_wrap=True)
    for row in table.rows:
        out.add_row(*_cells(row, best), style="bold" if row.learned else None)
    return out


def _cells(row: Row, best: Row) -> list[str]:
    cells = [row.policy + "*" * row.learned + "†" * row.oracle, _percent(row.interval("goodput"))]
    cells.append("" if row is best else _percent(row.against(best, "goodput"), sign="+"))
    for _, name, factor, _ in _LATENCIES:
        cells.append(_with_half_width(row.interval(f"{name}_mean_s"), factor))
        cells.append(_short(row.interval(f"{name}_p50_s").mean * factor))
        cells.append(_with_half_width(row.interval(f"{name}_p99_s"), factor))
    cells.append(_short(row.interval("preemptions").mean * 1e3))
    cells.append(f"{row.interval('cache_hits').mean * 100:.1f}")
    cells.append(f"{row.interval('unfinished').mean:.0f}")
    return cells


def _with_half_width(value: Interval, factor: float) -> str:
    return f"{_short(value.mean * factor)}±{_short(value.half_width * factor, 2)}"


def _percent(value: Interval, sign: str = "") -> str:
    return f"{value.mean * 100:{sign}.2f}±{value.half_width * 100:.2f}"


def _short(value: float, digits: int = 3) -> str:
    """A few significant digits, at most three decimals, without an exponent."""
    if math.isnan(value):
        return "-"
    if 0 < abs(value) < 0.1:
        return f"{value:.3f}".removesuffix("0").removesuffix("0")
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


PLOTS = (("goodput", "goodput (fraction)", False), ("ttft_p99_s", "TTFT P99 (s)", True),
         ("tpot_p99_s", "TPOT P99 (s)", True), ("e2e_p99_s", "E2E P99 (s)", True))  # fmt: skip


def plot(tables: Sequence[Table], folder: Path) -> list[Path]:
    """One PNG a scenario and fleet: four metrics over the load with 95% intervals; needs matplotlib.

    Raises:
        ImportError: without matplotlib (`pip install servegym[plots]`).
    """
    import matplotlib

    matplotlib.use("Agg")
    paths = []
    for scenario, cluster in dict.fromkeys((t.scenario, t.setting.cluster) for t in tables):
        path = folder / f"{re.sub(r'[^A-Za-z0-9.+-]', '_', f'{scenario}-{cluster}')}.png"
        own = [t for t in tables if (t.scenario, t.setting.cluster) == (scenario, cluster)]
        _plot_cluster(own, path)
        paths.append(path)
    return paths


def _plot_cluster(tables: Sequence[Table], path: Path) -> None:
    from matplotlib import pyplot

    tables = sorted(tables, key=lambda t: t.setting.load)
    names = [row.policy for row in tables[-1].rows]  # best first, where the load is highest
    figure, axes = pyplot.subplots(2, 2, figsize=(13, 8), sharex=True)
    for axis, (metric, label, is_log) in zip(axes.flat, PLOTS, strict=True):
        for place, name in enumerate(names):
            _plot_policy(axis, tables, name, metric, place, (place + 0.5) / len(names) - 0.5)
        axis.set(ylabel=label, yscale="log" if is_log else "linear")
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("offered load (fraction of saturation)")
    figure.suptitle(f"{tables[0].scenario}: {tables[0].setting.cluster}")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="center right", fontsize="small")
    figure.tight_layout(rect=(0, 0, 0.83, 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _plot_policy(
    axis: Any, tables: Sequence[Table], name: str, metric: str, place: int, shift: float
) -> None:
    """One line; policies stand beside each other at each load, so that no interval hides another."""
    rows = [next(r for r in t.rows if r.policy == name) for t in tables]
    values = [row.interval(metric) for row in rows]
    learned = rows[0].learned
    axis.errorbar(
        [t.setting.load * (1 + 0.04 * shift) for t in tables],
        [v.mean for v in values],
        [v.half_width for v in values],
        label=name,
        color="black" if learned else f"C{place % 10}",
        linestyle="-" if learned or place < 10 else "--",
        linewidth=2.0 if learned else 0.9,
        marker="o",
        markersize=3,
        capsize=2,
    )
