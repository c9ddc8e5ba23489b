"""A calibration: the runtime's iterations, copies and start on this machine, and the profile made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from statistics import median

import numpy as np

from servegym.envs.cluster.settings import Setting
from servegym.envs.cluster.state import NEVER
from servegym.envs.costs.fitting import as_curve, as_surface
from servegym.envs.costs.profile import Device, Error, Geometry, Link, Profile, Provenance
from servegym.runtime.calibrate.bench import EngineBench
from servegym.runtime.calibrate.fit import errors, fit, with_parts
from servegym.runtime.calibrate.links import Copies, fit_link, measure_copies
from servegym.runtime.calibrate.machine import Machine, host_bandwidth, memory_bandwidth
from servegym.runtime.calibrate.measure import beside, measure, typical
from servegym.runtime.calibrate.shapes import Axes, Design, Limits, design
from servegym.runtime.calibrate.start import start_of, warm_up_s, weights_s
from servegym.runtime.calibrate.timing import decode_bandwidth, migration_downtime, time_swap, time_transfer
from servegym.runtime.engine.instance import Instance
from servegym.runtime.engine.model import Transformer, geometry
from servegym.runtime.steady import undisturbed

MOST_COPIED = 8192  # tokens of the longest copy that is measured
DOWNTIME_CONTEXTS = tuple(256 << k for k in range(6))  # 256 ... 8k, as in Llumnix, figure 10
DOWNTIME_ROUNDS = 3
SLACK = 64  # tokens that the migrated request generates
DECODES, DECODE_CONTEXT = 64, 4096  # where decode attention is held to the memory bandwidth, if the KV fits

_NOTES = (
    "fitted to medians of whole iterations: schedule, forward, sample, deliver",
    "decode and mixed attention also hold what else grows with their batch",
    "swap latency is that of a copy of swap_group blocks, shared among the 2 x layers calls of the model",
    "start: weights from the page cache, first iteration and CUDA graphs; no engine process is started",
)


@dataclass(frozen=True)
class Options:
    """How a calibration is done.

    Attributes:
        limits: what the engine can hold.
        rounds: times that every shape is measured.
        size: random shapes of each kind that are fitted; half as many are held out.
        swap_group: KV blocks that a copy to host memory carries.
        seed: of shapes, order and token ids.
    """

    limits: Limits
    rounds: int = 7
    size: int = 40
    swap_group: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Calibration:
    """What was measured, and the profile that explains it.

    Attributes:
        seconds: of `design.fitted`, then `design.held_out`; float64 [shapes, rounds].
        copies: way of copying -> what copies took.
        figures: name with its unit -> number, for the report.
    """

    profile: Profile
    design: Design
    seconds: np.ndarray
    copies: dict[str, Copies]
    figures: dict[str, float]


def calibrate(
    model: Transformer,
    machine: Machine,
    options: Options,
    *,
    name: str,
    command: str,
    neighbours: Sequence[Transformer] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """Measure everything that a profile holds.

    Args:
        model: weights on the device that is measured.
        machine: what runs it, for the provenance.
        options: how.
        name: of the profile.
        command: what the user typed, for the provenance.
        neighbours: models of other instances that iterate meanwhile, as they will when all serve.
        progress: told what is measured next.

    Raises:
        InputError: a KV pool that does not fit the device.
    """
    limits = options.limits
    shapes = design(limits, size=options.size, seed=options.seed)
    progress("weights and warm-up")
    weights = weights_s(model)  # first: later there is no room on the device for them a second time
    instances = [Instance(m, _setting(options), k) for k, m in enumerate((model, *neighbours))]
    start = start_of(weights, warm_up_s(instances))
    benches = [EngineBench(instance, options.seed + k) for k, instance in enumerate(instances)]
    every = (*shapes.fitted, *shapes.held_out)
    with beside(benches[1:], every, options.seed):
        seconds = measure(benches[0], every, rounds=options.rounds, seed=options.seed, progress=progress)
        overhead_s, launch_s = benches[0].overheads()  # last: neighbours have compiled what they need by now
    # What is left of every iteration must be positive, however disturbed the measurement of the overhead was.
    overhead_s = min(overhead_s, float(typical(seconds).min()) / 2)
    progress("copies")
    setting = instances[0].setting._replace(blocks=_most_copied(limits), host_blocks=0)
    target = Instance(model, setting, number=-1)
    copies, links, link_errors = _copies(instances[0], target, options)
    progress("bandwidth and migration")
    figures = _figures(instances[0], options)
    figures |= {"overhead, us": overhead_s * 1e6, "launch of a forward pass, us": launch_s * 1e6}
    figures |= {
        f"start: {field.removesuffix('_s').replace('_', ' ')}, s": value
        for field, value in vars(start).items()
        if value
    }
    shape = geometry(model.config, model.dtype.itemsize)
    fresh = blank(shape, machine.device, machine.software, limits, name, shapes.axes)
    fixed = replace(fresh, overhead_us=round(overhead_s * 1e6, 2), start=start, **links)  # type: ignore[arg-type]
    count = len(shapes.fitted)
    parts = fit(shapes.axes, shapes.fitted, typical(seconds)[:count] - overhead_s)
    profile = with_parts(fixed, parts)
    held_out = errors(profile, shapes.held_out, typical(seconds)[count:]) | link_errors
    notes = (*_NOTES, f"instances iterating at the same time: {len(instances)}", command)
    origin = replace(profile.provenance, held_out=held_out, notes=notes)
    return Calibration(replace(profile, provenance=origin), shapes, seconds, copies, figures)


def measured_again(calibration: Calibration, seconds: np.ndarray) -> Profile:
    """The profile, its iterations fitted to other times of `design.fitted`; the rest is as before."""
    profile, shapes = calibration.profile, calibration.design
    overhead_s = profile.overhead_us / 1e6
    return with_parts(profile, fit(shapes.axes, shapes.fitted, np.asarray(seconds) - overhead_s))


def _setting(options: Options) -> Setting:
    """The engine as it is measured: no prefix cache, room in host memory for the longest copy."""
    limits = options.limits
    return Setting(
        blocks=limits.kv_blocks,
        block_tokens=limits.block_tokens,
        budget=limits.token_budget,
        max_seqs=limits.max_seqs,
        watermark=0,
        by_priority=False,
        reserve=True,
        caching=False,
        asynchronous=False,
        host_blocks=_most_copied(limits),
        by_swap=False,
        swap_call=0,
        swap_block=0,
        swap_group=options.swap_group,
        overlap=0,
        net_call=0,
        net_block=0,
        drain=NEVER,
    )


def blank(model: Geometry, device: Device, software: str, limits: Limits, name: str, axes: Axes) -> Profile:
    """The profile before anything is fitted."""
    nothing = as_curve(np.asarray(axes.tokens), np.zeros(len(axes.tokens)))
    empty = as_surface(np.arange(2), np.arange(2), np.zeros((2, 2)))
    now = datetime.now(UTC).date().isoformat()
    return Profile(
        name,
        model,
        device,
        tensor_parallel=1,
        kv_blocks=limits.kv_blocks,
        block_tokens=limits.block_tokens,
        token_budget=limits.token_budget,
        max_seqs=limits.max_seqs,
        linear=nothing,
        head=nothing,
        prefill_attention=empty,
        decode_attention=empty,
        provenance=Provenance(f"servegym calibrate on {device.name}", software, now),
    )


def _most_copied(limits: Limits) -> int:
    """Blocks of the longest copy."""
    return min(limits.kv_blocks, -(-MOST_COPIED // limits.block_tokens))


def _copies(
    instance: Instance, target: Instance, options: Options
) -> tuple[dict[str, Copies], dict[str, Link], dict[str, Error]]:
    """Swaps block by block and in groups, both ways, and copies to another instance."""
    limits, config = options.limits, instance.model.config
    block_bytes = geometry(config, instance.model.dtype.itemsize).kv_bytes_per_token * limits.block_tokens
    most = _most_copied(limits)
    sizes = sorted({*(2**k for k in range(most.bit_length()) if 2**k <= most), most})

    def taken(copy: Callable[[int], Sequence[float]], group: int) -> list[Copies]:
        return measure_copies(copy, sizes, block_bytes, group, options.rounds, options.seed)

    found: dict[str, Copies] = {}
    for group in sorted({1, options.swap_group}):
        both_ways = taken(partial(time_swap, instance, group=group), group)
        found |= {f"swap {way}, {group} a call": c for way, c in zip(("out", "in"), both_ways, strict=True)}
    (found["to another instance"],) = taken(lambda n: (time_transfer(instance, target, n),), most)
    both = [found[f"swap {way}, {options.swap_group} a call"] for way in ("out", "in")]
    mean = replace(both[0], seconds=np.mean([copies.seconds for copies in both], axis=0))
    swap, swap_error = fit_link(mean, 2 * config.layers)
    network, network_error = fit_link(found["to another instance"])
    links, linked = {"swap": swap, "network": network}, {"swap": swap_error, "network": network_error}
    return found, links, linked


def _figures(instance: Instance, options: Options) -> dict[str, float]:
    """How near decode attention comes to the memory's bandwidth, and the downtime of migrations."""
    limits, device = options.limits, instance.model.device.type
    batch = min(DECODES, limits.kv_blocks)
    context = min(DECODE_CONTEXT, limits.kv_blocks // batch * limits.block_tokens)
    bandwidth = memory_bandwidth(device)
    reached = decode_bandwidth(instance, batch, context).bytes_per_second
    figures = {
        "memory bandwidth, GB/s": bandwidth / 1e9,
        f"decode attention, batch {batch}, context {context}, GB/s": reached / 1e9,
        "share of the memory bandwidth, %": 100 * reached / bandwidth,
    }
    if device == "cuda":
        for pinned, kind in ((True, "pinned"), (False, "pageable")):
            figures[f"one copy from {kind} host memory, GB/s"] = host_bandwidth(pinned) / 1e9
    contexts = [n for n in DOWNTIME_CONTEXTS if n <= min(limits.max_context, instance.most_tokens - SLACK)]
    blocks = -(-(max(contexts, default=0) + SLACK) // limits.block_tokens)
    setting = instance.setting._replace(blocks=blocks, host_blocks=0)
    with undisturbed():
        taken = migration_downtime(instance.model, setting, contexts * DOWNTIME_ROUNDS) if contexts else []
    for context in contexts:
        gap_s = median(found.gap_s for found in taken if found.context == context)
        figures[f"downtime of a migration at {context} tokens, ms"] = 1e3 * gap_s
    return figures
