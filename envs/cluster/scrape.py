"""The metrics scrape: what a router last read from an engine's /metrics, stale by up to a period, and noisy.

Instance i is read at phase + k * period for k = 0, 1, ...; the phase is drawn from (seed, i), so replicas are
not read in step. Nothing happens at a tick. Instead every change of an instance first calls `scrape`, which
settles the ticks that have passed with the values that still hold. With period 0 observations read afresh.
"""

from __future__ import annotations

import math

import numpy as np

from servegym.envs.cluster.kernel import inlined
from servegym.envs.cluster.state import NEVER, NONE

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_UNIT = 2.0**-53
_RUNNING, _WAITING, _USAGE = range(3)


@inlined
def mix(x, y):
    """Hash two integers to 64 bits (the output function of SplitMix64, Steele et al. 2014)."""
    z = np.uint64(x) + (np.uint64(y) + np.uint64(1)) * _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


@inlined
def uniform(bits):
    """Number in [0, 1) from 64 random bits."""
    return np.float64(bits >> np.uint64(11)) * _UNIT


@inlined
def _stream(world, l, i):
    """Random bits of an instance, others in every episode that the lane plays."""
    return mix(mix(world.lane[l].seed, world.lane[l].plays), i)


@inlined
def start_scrape(world, l, i):
    """Forget all readings: the instance is empty and time is 0."""
    inst = world.instance[l, i]
    period = world.episode[world.lane[l].episode].scrape_period
    inst.next_scrape = NEVER
    if period > 0:
        inst.next_scrape = np.int64(uniform(_stream(world, l, i)) * period)
    inst.scraped_at = 0
    inst.seen_preemptions = 0
    inst.seen_running = 0.0
    inst.seen_waiting = 0.0
    inst.seen_usage = 0.0
    inst.seen_rise = 0.0


@inlined
def steps_done(inst, t):
    """Whole decode steps that the stretch in flight has made before time t, by linear interpolation.

    Steps grow longer by microseconds as context grows, so this is a step off at most, near its boundary.
    """
    if inst.steps <= 1:
        return 0
    done = np.int64(inst.steps * ((t - inst.begin) / (inst.until - inst.begin)))
    return min(done, inst.steps - 1)


@inlined
def running_requests(inst):
    """Requests that the engine runs, as vLLM counts: decoding, ending their prefill, or partly computed."""
    return inst.running + inst.fresh + (inst.part != NONE)


@inlined
def kv_usage(world, l, i, t):
    """Fraction of the KV blocks that requests hold at time t.

    The engine books the blocks of a stretch beyond its first step later, at its end at the latest; until then
    each decode of it takes a block in `block_tokens` steps.
    """
    inst = world.instance[l, i]
    setting = world.setting[world.lane[l].fleet, i]
    grown = max(0, steps_done(inst, t) + 1 - inst.booked_steps) * inst.running / setting.block_tokens
    return min((setting.blocks - inst.free + grown) / setting.blocks, 1.0)


@inlined
def _read(world, l, i, tick):
    """Take the readings of one tick."""
    inst = world.instance[l, i]
    inst.seen_running = running_requests(inst)
    inst.seen_waiting = inst.waiting
    inst.seen_usage = kv_usage(world, l, i, tick)
    inst.seen_rise = inst.preemptions - inst.seen_preemptions
    inst.seen_preemptions = inst.preemptions
    inst.scraped_at = tick
    noise = world.episode[world.lane[l].episode].scrape_noise
    if noise > 0.0:
        bits = mix(_stream(world, l, i), tick)
        spread = noise * math.sqrt(12.0)
        inst.seen_running *= max(0.0, 1.0 + spread * (uniform(mix(bits, _RUNNING)) - 0.5))
        inst.seen_waiting *= max(0.0, 1.0 + spread * (uniform(mix(bits, _WAITING)) - 0.5))
        inst.seen_usage *= max(0.0, 1.0 + spread * (uniform(mix(bits, _USAGE)) - 0.5))


@inlined
def scrape(world, l, i, t):
    """Settle the ticks up to time t; call it before anything about the instance changes at t.

    Of several ticks only the last counts: the state was the same at all, so the last saw no preemption.
    """
    inst = world.instance[l, i]
    if t < inst.next_scrape:
        return
    period = world.episode[world.lane[l].episode].scrape_period
    later = (t - inst.next_scrape) // period
    if later > 0:
        inst.seen_preemptions = inst.preemptions
    tick = inst.next_scrape + later * period
    _read(world, l, i, tick)
    inst.next_scrape = tick + period


@inlined
def look(world, l, i, t):
    """Bring the readings up to what a router has at time t."""
    if world.episode[world.lane[l].episode].scrape_period > 0:
        scrape(world, l, i, t)
    else:
        _read(world, l, i, t)
