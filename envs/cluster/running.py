"""The running requests of an instance, and what it has in flight.

Per request the run arrays keep numbers that do not change as the clock runs (clock at the finish, length
minus clock), so that a decode step costs nothing per request.
"""

from __future__ import annotations

from servegym.envs.cluster.kernel import inlined
from servegym.envs.cluster.memory import setting_of
from servegym.envs.cluster.state import FINISH, NEVER, NONE, OFFSET, REQUEST
from servegym.envs.costs.model import steps_to_reach, stretch_ps


@inlined
def join(world, l, i, at):
    """The request at position `at` of the run arrays starts to decode."""
    inst = world.instance[l, i]
    run = world.run
    offset = run[l, i, OFFSET, at]
    inst.context += offset + inst.clock
    inst.top = max(inst.top, offset)
    inst.next_finish = min(inst.next_finish, run[l, i, FINISH, at])
    world.residue[l, i, (offset - 1) % setting_of(world, l, i).block_tokens] += 1


@inlined
def leave(world, l, i, at):
    """The decoding request at position `at` leaves; the last takes its place."""
    inst = world.instance[l, i]
    run = world.run[l, i]
    offset, finish = run[OFFSET, at], run[FINISH, at]
    inst.context -= offset + inst.clock
    world.residue[l, i, (offset - 1) % setting_of(world, l, i).block_tokens] -= 1
    inst.running -= 1
    last = inst.running
    for k in range(run.shape[0]):
        run[k, at] = run[k, last]
    if offset == inst.top:
        inst.top = -NEVER
        offsets = run[OFFSET]
        for k in range(last):
            inst.top = max(inst.top, offsets[k])
    if finish == inst.next_finish:
        inst.next_finish = NEVER
        finishes = run[FINISH]
        for k in range(last):
            inst.next_finish = min(inst.next_finish, finishes[k])


@inlined
def position(world, l, i, r):
    """Where request r stands in the run arrays; NONE where it does not decode on instance i."""
    requests = world.run[l, i, REQUEST]
    for k in range(world.instance[l, i].running):
        if requests[k] == r:
            return k
    return NONE


@inlined
def cut(world, l, i, now):
    """End the stretch in flight at its first boundary at or after now, so that a change is scheduled."""
    inst = world.instance[l, i]
    if inst.steps <= 1:
        return
    p = setting_of(world, l, i).profile
    top = inst.top + inst.clock
    steps = steps_to_reach(world.tables, p, inst.running, inst.context, top, inst.steps, now - inst.begin)
    if steps < inst.steps:
        inst.steps = steps
        inst.until = inst.begin + stretch_ps(world.tables, p, inst.running, inst.context, top, steps)


@inlined
def kick(world, l, i, now):
    """Something has changed on instance i: schedule at its next boundary, or at once where it is idle."""
    inst = world.instance[l, i]
    if inst.until == NEVER:
        inst.begin = inst.until = now
        inst.steps = inst.booked_steps = 0
    else:
        cut(world, l, i, now)


@inlined
def tokens_computed(world, l, i, at):
    """KV tokens that the decoding request at position `at` holds by iterations that have ended.

    Exact at a boundary and behind `cut`, when all steps in flight but the last have ended.
    """
    inst = world.instance[l, i]
    return world.run[l, i, OFFSET, at] + inst.clock - 1 + max(inst.steps - 1, 0)
