"""A calibration: the runtime's iterations, copies and start on this machine, and the profile made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial

import numpy as np

from servegym.envs.cluster.settings import Setting
from servegym.envs.cluster.state import NEVER
from servegym.envs.costs.fitting import as_curve, as_surface
from servegym.envs.costs.profile import Device, Error, Geometry, Link, Profile, Provenance
from servegym.runtime.calibrate.bench import EngineBench
from servegym.runtime.calibrate.figures import figures
from servegym.runtime.calibrate.fit import errors, fit, with_parts
from servegym.runtime.calibrate.links import Copies, fit_link, joined, measure_copies
from servegym.runtime.calibrate.machine import Machine
from servegym.runtime.calibrate.measure import beside, measure, typical
from servegym.runtime.calibrate.shapes import Axes, Design, Limits, design
from servegym.runtime.calibrate.start import start_of, warm_up_s, weights_s
from servegym.runtime.calibrate.timing import time_swap, time_transfer
from servegym.runtime.engine.instance import Instance
from servegym.runtime.engine.model import Transformer, geometry

MOST_COPIED = 8192  # tokens of the longest copy that is measured

_NOTES = (
    "fitted to medians of whole iterations: schedule, forward, sample, deliver",
    "decode and mixed attention also hold what else grows with their batch",
    "swap latency is that of one of the 2 x layers copies of a group of blocks; groups of one and of "
    "swap_group blocks were measured",
    "swap.overlap is not measured and stands as 0: on CUDA swaps out run beside the next iteration, in part",
    "the bandwidth of decode attention is by the host's clock: where little is read, launches are most of it",
    "start: weights from the page cache, first iteration and CUDA graphs; no engine process is started",
)


@dataclass(frozen=True)
class Options:
    """How a calibration is done.

    Attributes:
        limits: what the engine can hold.
        rounds: times that every shape is measured.
        size: random shapes of each kind that are fitted; half as many are held out.
        swap_group: KV blocks that a copy to host memory carries, beside copies of single ones.
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
    setting = _setting(options)
    instances = [Instance(m, setting, k) for k, m in enumerate((model, *neighbours))]
    # For copies between instances. Now: if there is no room for it, that should show before all the rest.
    target = Instance(model, setting._replace(blocks=_most_copied(limits), host_blocks=0), number=-1)
    start = start_of(weights, warm_up_s(instances))
    benches = [EngineBench(instance, options.seed + k) for k, instance in enumerate(instances)]
    every = (*shapes.fitted, *shapes.held_out)
    with beside(benches[1:], every, options.seed):
        seconds = measure(benches[0], every, rounds=options.rounds, seed=options.seed, progress=progress)
        overhead_s, launch_s = benches[0].overheads()  # last: neighbours have compiled what they need by now
    # What is left of every iteration must be positive, however disturbed the measurement of the overhead was.
    overhead_s = min(overhead_s, float(typical(seconds).min()) / 2)
    progress("copies")
    copies, links, link_errors = _copies(instances[0], target, options)
    progress("bandwidth and migration")
    found, not_measured = figures(instances[0], limits)
    found |= {"overhead, us": overhead_s * 1e6, "launch of a forward pass, us": launch_s * 1e6}
    found |= {
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
    notes = (*_NOTES, f"instances iterating at the same time: {len(instances)}", *not_measured, command)
    origin = replace(profile.provenance, held_out=held_out, notes=notes)
    return Calibration(replace(profile, provenance=origin), shapes, seconds, copies, found)


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

    def taken(copy: Callable[[int, int], Sequence[float]], *groups: int) -> dict[int, list[Copies]]:
        return measure_copies(copy, sizes, groups, block_bytes, options.rounds, options.seed)

    swaps = taken(partial(time_swap, instance), *sorted({1, options.swap_group}))
    found = {
        f"swap {way}, {group} a call": copies
        for group, both in swaps.items()
        for way, copies in zip(("out", "in"), both, strict=True)
    }
    (found["to another instance"],) = taken(lambda n, _: (time_transfer(instance, target, n),), most)[most]
    means = [replace(out, seconds=(out.seconds + back.seconds) / 2) for out, back in swaps.values()]
    swap, swap_error = fit_link(joined(means), 2 * config.layers)
    network, network_error = fit_link(found["to another instance"])
    links, linked = {"swap": swap, "network": network}, {"swap": swap_error, "network": network_error}
    return found, links, linked
