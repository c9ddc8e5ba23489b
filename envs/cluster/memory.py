"""KV blocks of an instance: what requests hold, what the decode steps in flight take, what fits."""

from __future__ import annotations

from servegym.envs.cluster import prefix
from servegym.envs.cluster.kernel import inlined


@inlined
def setting_of(world, l, i):
    """The settings of instance i."""
    return world.setting[world.lane[l].fleet, i]


@inlined
def blocks_of(block_tokens, tokens):
    """Blocks that hold so many tokens."""
    return (tokens + block_tokens - 1) // block_tokens


@inlined
def room(setting):
    """Tokens that an instance can hold when nothing else is there."""
    return (setting.blocks - setting.watermark) * setting.block_tokens


@inlined
def fits(world, l, i, r):
    """Whether instance i may get request r: it does not drain, and holds the prompt and the longest output.

    A router does not know how long the output will be. The largest instance may get every request.
    """
    lane = world.lane[l]
    setting = setting_of(world, l, i)
    tokens = min(world.row[lane.first_row + r].prompt + lane.longest_output, lane.room)
    return tokens <= room(setting) and lane.now < setting.drain


@inlined
def blocks_for_steps(world, l, i, steps):
    """Blocks that the next `steps` decode steps take."""
    inst = world.instance[l, i]
    size = setting_of(world, l, i).block_tokens
    residue = world.residue[l, i]
    total = inst.running * (steps // size)
    at = (-inst.clock) % size
    for _ in range(steps % size):
        total += residue[at]
        at = at - 1 if at else size - 1
    return total


@inlined
def steps_within(world, l, i, blocks, most):
    """How many decode steps, up to `most`, the blocks suffice for."""
    inst = world.instance[l, i]
    size = setting_of(world, l, i).block_tokens
    if inst.running * (most // size + 1) <= blocks:
        return most
    # Every `size` steps take a block for each request; the rest is counted step by step.
    steps = blocks // inst.running * size
    blocks %= inst.running
    at = (-inst.clock) % size
    while steps < most:
        blocks -= world.residue[l, i, at]
        if blocks < 0:
            break
        steps += 1
        at = at - 1 if at else size - 1
    return min(steps, most)


@inlined
def book_steps(world, l, i):
    """Take the blocks of all decode steps in flight; those of the first were taken when it was scheduled."""
    inst = world.instance[l, i]
    if inst.steps <= inst.booked_steps:
        return
    inst.free -= blocks_for_steps(world, l, i, inst.steps) - blocks_for_steps(world, l, i, inst.booked_steps)
    inst.booked_steps = inst.steps
    if inst.unit_blocks:
        prefix.evict(world, l, i)


@inlined
def give_back(world, l, i, r, tokens):
    """Request r lets all its KV go, of which `tokens` tokens are filled."""
    inst = world.instance[l, i]
    row = world.lane[l].first_row + r
    prefix.publish(world, l, i, r, row, tokens)
    size = setting_of(world, l, i).block_tokens
    inst.free += blocks_of(size, tokens) - world.req[l, r].units * inst.unit_blocks
    if inst.unit_blocks:
        prefix.release(world, l, i, r, row)
