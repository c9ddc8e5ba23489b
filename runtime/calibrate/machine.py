"""The machine under measurement: its name, memory, software and memory bandwidth."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from servegym.envs.costs.profile import Device
from servegym.errors import InputError

COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}  # far beyond any cache
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}


@dataclass(frozen=True)
class Machine:
    """Where a calibration runs."""

    device: Device
    software: str


def check_device(name: str) -> None:
    """Refuse a device that is not here.

    Raises:
        InputError: an unknown kind, or CUDA where torch sees none.
    """
    if name not in DTYPES:
        raise InputError("runtime", "device", name, f"choose one of {', '.join(DTYPES)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("runtime", "device", name, "torch sees no CUDA device here; use cpu")


def this_machine(device: str) -> Machine:
    """Name, memory and versions."""
    software = f"torch {torch.__version__}, Python {platform.python_version()}"
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        software += f", CUDA {torch.version.cuda}"
        return Machine(Device(found.name, memory_bytes=found.total_memory), software)
    return Machine(Device(_processor(), memory_bytes=_memory()), software)


def memory_bandwidth(device: str) -> float:
    """Bytes/s of the fastest of some large copies within the device's memory, reads and writes together."""
    source = torch.ones(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    best = min(timed(lambda: target.copy_(source), device) for _ in range(7))
    return 2 * source.nbytes / best


def host_bandwidth(pinned: bool) -> float:
    """Bytes/s of the fastest of some large copies from host memory to a CUDA device."""
    source = torch.ones(COPY_BYTES["cpu"] // 4, pin_memory=pinned)
    target = torch.empty_like(source, device="cuda")
    return source.nbytes / min(
        timed(lambda: target.copy_(source, non_blocking=True), "cuda") for _ in range(8)
    )


def timed(work, device: str, rounds: int = 1) -> float:  # type: ignore[no-untyped-def]
    """Median seconds of `work()`: by device events on CUDA, by the clock on the CPU."""
    if device != "cuda":
        return median(_by_clock(work) for _ in range(rounds))
    return median(_by_events(work) for _ in range(rounds))


def wait_for(device: torch.device) -> None:
    """Return once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _by_clock(work) -> float:  # type: ignore[no-untyped-def]
    start = perf_counter()
    work()
    return perf_counter() - start


def _by_events(work) -> float:  # type: ignore[no-untyped-def]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _processor() -> str:
    """Model of the processor; `platform` does not know it on Linux."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine() or "unknown CPU")


def _memory() -> int:
    """Bytes of main memory."""
    info = Path("/proc/meminfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    sizes = (int(line.split()[1]) << 10 for line in lines if line.startswith("MemTotal"))
    return next(sizes, 1)
