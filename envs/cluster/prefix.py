"""The prefix cache of an instance: chained blocks in a hash table, idle ones in order of last use.

Ids are chained (an id names its whole prefix), so a request's blocks are found by walking its ids until the
first miss. A block that no request holds stays until its memory is needed; the one idle for longest goes
first. Requests release their blocks last to first, so a block always outlives the blocks that extend it.

Where this is not vLLM v1: empty blocks are taken before any cached block is evicted (vLLM keeps both in one
queue), equal blocks computed side by side are kept once (vLLM keeps both copies), the blocks that a request
generates are shared when it ends, not as they fill, and requests of a workload without prefix ids share
nothing, not even with themselves after a preemption.
"""

from __future__ import annotations

from servegym.envs.cluster.kernel import inlined, kernel
from servegym.envs.cluster.state import NONE

_MIX = 0x9E3779B1  # 2**32 / golden ratio, Knuth's multiplicative hash


@inlined
def _home(world, key):
    mask = world.slot.shape[2] - 1
    return ((key * _MIX) >> 7) & mask


@inlined
def _slot_of(world, l, i, key):
    """Slot that holds the key, or the empty one where it belongs."""
    mask = world.slot.shape[2] - 1
    slot = _home(world, key)
    while True:
        unit = world.slot[l, i, slot] - 1
        if unit == NONE or world.unit[l, i, unit].key == key:
            return slot
        slot = (slot + 1) & mask


@inlined
def find(world, l, i, key):
    """The unit that caches prefix block `key` on instance i, or NONE."""
    return world.slot[l, i, _slot_of(world, l, i, key)] - 1


@inlined
def _unlink(world, l, i, unit):
    """Take an idle unit out of the order of last use."""
    inst = world.instance[l, i]
    older, newer = world.unit[l, i, unit].older, world.unit[l, i, unit].newer
    if older == NONE:
        inst.oldest = newer
    else:
        world.unit[l, i, older].newer = newer
    if newer == NONE:
        inst.newest = older
    else:
        world.unit[l, i, newer].older = older
    inst.idle_units -= 1


@inlined
def _link(world, l, i, unit):
    """Put a unit that has become idle at the young end."""
    inst = world.instance[l, i]
    world.unit[l, i, unit].older = inst.newest
    world.unit[l, i, unit].newer = NONE
    if inst.newest == NONE:
        inst.oldest = unit
    else:
        world.unit[l, i, inst.newest].newer = unit
    inst.newest = unit
    inst.idle_units += 1


@inlined
def hold(world, l, i, unit):
    """One more request uses the unit; an idle unit's blocks stop being free."""
    if world.unit[l, i, unit].holders == 0:
        _unlink(world, l, i, unit)
        world.instance[l, i].free -= world.instance[l, i].unit_blocks
    world.unit[l, i, unit].holders += 1


@inlined
def _forget(world, l, i, slot):
    """Empty a hash slot and close the gap, so that probes find every key that stands behind it."""
    mask = world.slot.shape[2] - 1
    gap, probe = slot, slot
    while True:
        probe = (probe + 1) & mask
        unit = world.slot[l, i, probe] - 1
        if unit == NONE:
            break
        home = _home(world, world.unit[l, i, unit].key)
        if ((probe - home) & mask) >= ((probe - gap) & mask):
            world.slot[l, i, gap] = unit + 1
            gap = probe
    world.slot[l, i, gap] = 0


@kernel
def evict(world, l, i):
    """Drop idle units, oldest first, until the rest fit into the free blocks."""
    inst = world.instance[l, i]
    while inst.idle_units * inst.unit_blocks > inst.free:
        unit = inst.oldest
        _unlink(world, l, i, unit)
        _forget(world, l, i, _slot_of(world, l, i, world.unit[l, i, unit].key))
        world.unit[l, i, unit].newer = inst.spare
        inst.spare = unit
        inst.units -= 1


@kernel
def match(world, l, i, row, tokens):
    """Leading prefix blocks of a row that are cached and end within `tokens`: (blocks, of these idle)."""
    inst = world.instance[l, i]
    blocks = 0
    idle = 0
    if inst.unit_blocks == 0:
        return blocks, idle
    limit = min(world.row[row].prefixes, tokens // inst.unit_tokens)
    while blocks < limit:
        unit = find(world, l, i, world.prefix[world.row[row].prefix + blocks])
        if unit == NONE:
            break
        if world.unit[l, i, unit].holders == 0:
            idle += 1
        blocks += 1
    return blocks, idle


@kernel
def hold_matched(world, l, i, r, row, blocks):
    """Let request r hold the first `blocks` prefix blocks of its row, all of them cached."""
    first = world.row[row].prefix
    for k in range(blocks):
        hold(world, l, i, find(world, l, i, world.prefix[first + k]))
    world.req[l, r].units = blocks


@kernel
def publish(world, l, i, r, row, tokens):
    """Share the blocks that request r has filled with `tokens` tokens of KV.

    A block that somebody else has cached meanwhile is shared and r's own copy freed; otherwise r's blocks
    become the cached ones.
    """
    inst = world.instance[l, i]
    if inst.unit_blocks == 0:
        return
    limit = min(world.row[row].prefixes, tokens // inst.unit_tokens)
    held = world.req[l, r].units
    while held < limit:
        key = world.prefix[world.row[row].prefix + held]
        slot = _slot_of(world, l, i, key)
        unit = world.slot[l, i, slot] - 1
        if unit == NONE:
            unit = inst.spare
            inst.spare = world.unit[l, i, unit].newer
            inst.units += 1
            world.unit[l, i, unit].key = key
            world.unit[l, i, unit].holders = 1
            world.slot[l, i, slot] = unit + 1
        else:
            hold(world, l, i, unit)
            inst.free += inst.unit_blocks
        held += 1
    world.req[l, r].units = held


@kernel
def release(world, l, i, r, row):
    """Request r lets its prefix blocks go, last to first; those nobody holds become idle, counted as free."""
    inst = world.instance[l, i]
    first = world.row[row].prefix
    for k in range(world.req[l, r].units - 1, -1, -1):
        unit = find(world, l, i, world.prefix[first + k])
        world.unit[l, i, unit].holders -= 1
        if world.unit[l, i, unit].holders == 0:
            _link(world, l, i, unit)
            inst.free += inst.unit_blocks
    world.req[l, r].units = 0


@kernel
def clear(world, l, i, capacity):
    """Empty the cache of an instance and string `capacity` units on the spare list."""
    inst = world.instance[l, i]
    inst.units = 0
    inst.idle_units = 0
    inst.oldest = NONE
    inst.newest = NONE
    inst.spare = 0
    for unit in range(capacity):
        world.unit[l, i, unit].newer = unit + 1
    for slot in range(world.slot.shape[2]):
        world.slot[l, i, slot] = 0
