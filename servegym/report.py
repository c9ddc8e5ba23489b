"""What evaluation shows: a table a setting, and plots over the load."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from rich import box
from rich.table import Table as RichTable

from servegym.envs.metrics import Interval
from servegym.evaluation import Table
from servegym.files import folded

_LATENCIES = (("TTFT", "ttft", 1.0, "s"), ("TPOT", "tpot", 1e3, "ms"), ("E2E", "e2e", 1.0, "s"))
# Columns in the order in which a narrow terminal does without them.
_DISPENSABLE = (
    *("open", "cache\nhits %", "pre-\nempt"),
    *(f"{label}\n{part} {unit}" for part in ("P50", "mean", "P99") for label, _, _, unit in _LATENCIES[::-1]),
)
_Columns: TypeAlias = dict[str, list[str]]  # cells by header


def render(table: Table, width: int) -> RichTable:
    """A rich table of the columns that `width` characters hold.

    `±` is the half-width of a 95% interval over the seeds; a single seed has none.
    """
    columns = _columns(table)
    for header in _DISPENSABLE:
        if _width(columns) <= width:
            break
        del columns[header]
    return _drawn(table, columns)


def _drawn(table: Table, columns: _Columns) -> RichTable:
    best = table.best_heuristic
    seeds = len(best.samples["goodput"])
    setting = table.setting
    out = RichTable(
        title=f"{table.scenario}: {setting.cluster} at {table.rate_rps:.2f} requests/s "
        f"({setting.load:.0%} of saturation), {seeds} seed{'s' * (seeds > 1)} of {table.requests:,} requests",
        caption=f"Δ: paired difference in goodput to {best.policy}, percentage points; * trained; "
        "† reads the future; preempt: preemptions per 1000 requests; open: unfinished requests; "
        "±: 95% intervals, of the other columns (P50, preemptions, cache hits, open) in results.json",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        show_edge=False,
        title_justify="left",
        caption_justify="left",
    )
    for header in columns:
        out.add_column(header, justify="left" if header == "policy" else "right", no_wrap=True)
    for row, *cells in zip(table.rows, *columns.values(), strict=True):
        out.add_row(*cells, style="bold" if row.learned else None)
    return out


def _width(columns: _Columns) -> int:
    """Characters of a line: the longest of each column, and two between them."""
    longest = (max(map(len, "\n".join((header, *cells)).split("\n"))) for header, cells in columns.items())
    return sum(longest) + 2 * (len(columns) - 1)


def _columns(table: Table) -> _Columns:
    best, rows = table.best_heuristic, table.rows
    columns = {
        "policy": [folded(row.policy) + "*" * row.learned + "†" * row.oracle for row in rows],
        "goodput %": [_percent(row.interval("goodput")) for row in rows],
        "Δ best": ["" if row is best else _percent(row.against(best, "goodput"), "+") for row in rows],
    }
    for label, name, factor, unit in _LATENCIES:
        for statistic, show in (("mean", _with_half_width), ("P50", _mean), ("P99", _with_half_width)):
            metric = f"{name}_{statistic.lower()}_s"
            columns[f"{label}\n{statistic} {unit}"] = [show(row.interval(metric), factor) for row in rows]
    columns["pre-\nempt"] = [_mean(row.interval("preemptions"), 1e3) for row in rows]
    columns["cache\nhits %"] = [f"{row.interval('cache_hits').mean * 100:.1f}" for row in rows]
    columns["open"] = [f"{row.interval('unfinished').mean:.0f}" for row in rows]
    return columns


def _mean(value: Interval, factor: float) -> str:
    return _short(value.mean * factor)


def _with_half_width(value: Interval, factor: float) -> str:
    mean = _mean(value, factor)
    return mean if math.isnan(value.half_width) else f"{mean}±{_short(value.half_width * factor, 2)}"


def _percent(value: Interval, sign: str = "") -> str:
    mean = f"{value.mean * 100:{sign}.2f}"
    return mean if math.isnan(value.half_width) else f"{mean}±{value.half_width * 100:.2f}"


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
