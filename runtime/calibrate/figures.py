"""Figures of a report beside the profile, which is written even where one of them cannot be measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median

from servegym.errors import InputError
from servegym.runtime.calibrate.machine import host_bandwidth, memory_bandwidth
from servegym.runtime.calibrate.shapes import Limits
from servegym.runtime.calibrate.timing import decode_bandwidth, migration_downtime
from servegym.runtime.engine.instance import Instance
from servegym.runtime.steady import undisturbed

Figures = dict[str, float]  # name with its unit -> number

DOWNTIME_CONTEXTS = tuple(256 << k for k in range(6))  # 256 ... 8k, as in Llumnix, figure 10
DOWNTIME_ROUNDS = 3
SLACK = 64  # tokens that the migrated request generates
DECODES, DECODE_CONTEXT = 64, 4096  # where decode attention is held to the memory bandwidth, if the KV fits


def figures(instance: Instance, limits: Limits) -> tuple[Figures, list[str]]:
    """The figures, and a note for what could not be measured."""
    ways: dict[str, Callable[[], Figures]] = {
        "bandwidth of decode attention": lambda: bandwidth(instance, limits)
    }
    if instance.model.device.type == "cuda":
        ways["bandwidth from host memory"] = from_host
    ways["downtime of migrations"] = lambda: downtimes(instance, limits)
    return measured(ways)


def measured(ways: Mapping[str, Callable[[], Figures]]) -> tuple[Figures, list[str]]:
    """What each way gives, and a note for each that ran out of memory or was given up."""
    found: Figures = {}
    notes = []
    for name, measure in ways.items():
        try:
            found |= measure()
        except (RuntimeError, MemoryError, InputError) as error:  # CUDA's out-of-memory error is the first
            reason = (str(error) or repr(error)).splitlines()[0]
            notes.append(f"not measured: {name}: {reason}")
    return found, notes


def bandwidth(instance: Instance, limits: Limits) -> Figures:
    """How near decode attention comes to the memory's bandwidth."""
    batch = min(DECODES, limits.kv_blocks)
    context = min(DECODE_CONTEXT, limits.kv_blocks // batch * limits.block_tokens)
    most = memory_bandwidth(instance.model.device.type)
    reached = decode_bandwidth(instance, batch, context).bytes_per_second
    return {
        "memory bandwidth, GB/s": most / 1e9,
        f"decode attention, batch {batch}, context {context}, GB/s": reached / 1e9,
        "share of the memory bandwidth, %": 100 * reached / most,
    }


def from_host() -> Figures:
    """Bandwidth of copies from the host's memory to a CUDA device."""
    kinds = {"pinned": True, "pageable": False}
    return {
        f"one copy from {kind} host memory, GB/s": host_bandwidth(pin) / 1e9 for kind, pin in kinds.items()
    }


def downtimes(instance: Instance, limits: Limits) -> Figures:
    """What a migration costs its request, by context."""
    contexts = [n for n in DOWNTIME_CONTEXTS if n <= min(limits.max_context, instance.most_tokens - SLACK)]
    if not contexts:
        return {}
    blocks = -(-(contexts[-1] + SLACK) // limits.block_tokens)
    # One request at a time: graphs for more would take memory that may be short by now.
    setting = instance.setting._replace(blocks=blocks, host_blocks=0, max_seqs=1)
    with undisturbed():
        taken = migration_downtime(instance.model, setting, contexts * DOWNTIME_ROUNDS)
    gaps_s = {n: median(found.gap_s for found in taken if found.context == n) for n in contexts}
    return {f"downtime of a migration at {n} tokens, ms": 1e3 * gap_s for n, gap_s in gaps_s.items()}
