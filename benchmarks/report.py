"""The one line of JSON that every benchmark ends with, and the versions it ran on."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median

# A benchmark runs from a checkout, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def report(name: str, value: float, unit: str, goal: float, detail: Mapping[str, object]) -> None:
    """Print the result: `value` stands against `goal`, `detail` holds the rest."""
    line = {
        "name": name,
        "value": value,
        "unit": unit,
        "goal": goal,
        "detail": {**detail, "versions": versions()},
    }
    print(json.dumps(line))


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of repeated measurements."""
    return {"median": median(samples), "min": min(samples), "max": max(samples), "runs": len(samples)}


def versions() -> dict[str, object]:
    """Interpreter, libraries that decide speed, and the processor."""
    return {
        "python": platform.python_version(),
        "numba": version("numba"),
        "numpy": version("numpy"),
        "cpu": _processor(),
        "cpus": os.cpu_count(),
    }


def _processor() -> str:
    """Model of the processor; `platform` does not know it on Linux."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
