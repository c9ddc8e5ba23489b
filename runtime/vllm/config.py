"""What `--additional-config '{"servegym": {...}}'` may say to the scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from servegym.errors import InputError

WHERE = "--additional-config servegym"
ORDERS = ("arrival", "shortest")


@dataclass(frozen=True)
class SchedulerConfig:
    """Settings of `ServeGymScheduler`.

    Attributes:
        policy: folder of a bundle, or the name of a heuristic such as victim_largest.
        profile: what the engine's iterations cost: a profile's name, or a path to one as `servegym calibrate`
            writes it. Features such as the seconds of a recomputation come from it.
        budget_us: CPU time for an answer, microseconds; a policy that takes longer rests, and vLLM chooses.
        order: of waiting requests within a priority: `arrival`, as vLLM has it, or `shortest`, the least
            predicted output first.
        prefill_period_s: seconds between two questions for the prefill cap, the most prompt tokens of an
            iteration, to a policy that answers `budget`; 0: never.
        report: file that gets counts and decision times as JSON when the engine shuts down, and every minute.
    """

    policy: str
    profile: str
    budget_us: float = 500.0
    order: str = "arrival"
    prefill_period_s: float = 0.5
    report: str | None = None


def read_config(additional: Any) -> SchedulerConfig:
    """Check what vLLM hands on.

    Raises:
        InputError: unknown, missing or impossible fields.
    """
    raw = additional.get("servegym") if isinstance(additional, Mapping) else None
    names = [field.name for field in fields(SchedulerConfig)]
    if not isinstance(raw, Mapping):
        raise InputError("--additional-config", "servegym", raw, f"give an object with {', '.join(names)}")
    for name, value in raw.items():
        if name not in names:
            raise InputError(WHERE, name, value, f"choose from {', '.join(names)}")
    for name in ("policy", "profile"):
        if not isinstance(raw.get(name), str) or not raw[name]:
            raise InputError(WHERE, name, raw.get(name), "give a name or a path")
    budget, period = raw.get("budget_us", 500.0), raw.get("prefill_period_s", 0.5)
    order, report = raw.get("order", "arrival"), raw.get("report")
    if not _is_number(budget) or not 0 < budget < 1e6:
        raise InputError(WHERE, "budget_us", budget, "give microseconds between 0 and a million")
    if not _is_number(period) or not 0 <= period < 1e6:
        raise InputError(WHERE, "prefill_period_s", period, "give seconds, or 0 for never")
    if order not in ORDERS:
        raise InputError(WHERE, "order", order, f"choose {' or '.join(ORDERS)}")
    if report is not None and not (isinstance(report, str) and Path(report).absolute().parent.is_dir()):
        raise InputError(WHERE, "report", report, "give a file in a folder that exists")
    return SchedulerConfig(raw["policy"], raw["profile"], float(budget), order, float(period), report)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
