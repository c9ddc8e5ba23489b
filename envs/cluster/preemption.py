"""Preemption: which running request gives way when memory is short, and what becomes of its KV.

By recompute it loses its KV. By swap its blocks are copied to host memory, if there is room, and back when it
is admitted again; the copies of an iteration go over the instance's link before it starts, each as calls of
`swap_group` blocks.
"""

from __future__ import annotations

from servegym.envs.cluster import migration, waiting
from servegym.envs.cluster.kernel import inlined, kernel
from servegym.envs.cluster.memory import blocks_of, give_back, setting_of
from servegym.envs.cluster.running import leave, position
from servegym.envs.cluster.state import NONE, OFFSET, ORDER, REQUEST


@kernel
def default_victim(world, l, i):
    """The running request that vLLM preempts first: the last admitted, or the largest (priority, arrival)."""
    inst = world.instance[l, i]
    by_priority = setting_of(world, l, i).by_priority
    if inst.part != NONE and not by_priority:
        return inst.part
    worst = NONE
    for k in range(inst.running):
        if worst == NONE:
            if inst.part == NONE or waiting.before(world, l, inst.part, world.run[l, i, REQUEST, k]):
                worst = k
        elif by_priority:
            if waiting.before(world, l, world.run[l, i, REQUEST, worst], world.run[l, i, REQUEST, k]):
                worst = k
        elif world.run[l, i, ORDER, worst] < world.run[l, i, ORDER, k]:
            worst = k
    return inst.part if worst == NONE else world.run[l, i, REQUEST, worst]


@inlined
def kv_tokens(world, l, i, r):
    """KV tokens that running request r of instance i holds at a boundary."""
    inst = world.instance[l, i]
    if r == inst.part:
        return inst.part_done
    return world.run[l, i, OFFSET, position(world, l, i, r)] + inst.clock - 1


@inlined
def can_swap(world, l, i, tokens):
    """Whether the host has room for so many tokens of KV."""
    blocks = blocks_of(setting_of(world, l, i).block_tokens, tokens)
    return 0 < blocks <= world.instance[l, i].host_free


@inlined
def swap_ps(setting, blocks):
    """Picoseconds to copy so many blocks of one request between device and host."""
    return setting.swap_call * blocks_of(setting.swap_group, blocks) + setting.swap_block * blocks


@kernel
def preempt(world, l, i, r, by_swap, now):
    """Running request r of instance i gives way at a boundary; without room on the host it is recomputed."""
    inst = world.instance[l, i]
    req = world.req[l, r]
    tokens = kv_tokens(world, l, i, r)
    if r == inst.part:
        inst.part = NONE
    else:
        at = position(world, l, i, r)
        migration.save_progress(world, l, i, at, now)
        leave(world, l, i, at)
        if r == inst.out:
            migration.abort(world, l, i, now)
    give_back(world, l, i, r, tokens)
    if by_swap and can_swap(world, l, i, tokens):
        setting = setting_of(world, l, i)
        blocks = blocks_of(setting.block_tokens, tokens)
        inst.host_free -= blocks
        inst.copying += swap_ps(setting, blocks)
        req.hosted = tokens
    else:
        req.lost += tokens
    req.preemptions += 1
    inst.preemptions += 1
    inst.preempted = 1
    waiting.requeue(world, l, i, r)
