"""The waiting list of an instance, linked through REQ.next: FCFS or by (priority, arrival)."""

from __future__ import annotations

from servegym.envs.cluster.kernel import inlined
from servegym.envs.cluster.state import NONE


@inlined
def before(world, l, a, b):
    """Whether request a is scheduled before b under priorities."""
    first = world.lane[l].first_row
    row_a, row_b = world.row[first + a], world.row[first + b]
    if row_a.priority != row_b.priority:
        return row_a.priority < row_b.priority
    if world.req[l, a].arrived != world.req[l, b].arrived:
        return world.req[l, a].arrived < world.req[l, b].arrived
    return a < b


@inlined
def _insert_after(world, l, i, r, previous):
    inst = world.instance[l, i]
    if previous == NONE:
        world.req[l, r].next = inst.head
        inst.head = r
    else:
        world.req[l, r].next = world.req[l, previous].next
        world.req[l, previous].next = r
    if inst.tail == previous:
        inst.tail = r
    inst.waiting += 1


@inlined
def _insert_by_priority(world, l, i, r):
    previous, at = NONE, world.instance[l, i].head
    while at != NONE and before(world, l, at, r):
        previous, at = at, world.req[l, at].next
    _insert_after(world, l, i, r, previous)


@inlined
def enqueue(world, l, i, r):
    """A new request joins the waiting list."""
    if world.setting[world.lane[l].fleet, i].by_priority:
        _insert_by_priority(world, l, i, r)
    else:
        _insert_after(world, l, i, r, world.instance[l, i].tail)


@inlined
def requeue(world, l, i, r):
    """A preempted request goes back to the front."""
    if world.setting[world.lane[l].fleet, i].by_priority:
        _insert_by_priority(world, l, i, r)
    else:
        _insert_after(world, l, i, r, NONE)


@inlined
def holds(world, l, i, r):
    """Whether request r waits on instance i."""
    at = world.instance[l, i].head
    while at != NONE and at != r:
        at = world.req[l, at].next
    return at == r


@inlined
def remove(world, l, i, r):
    """Request r, which waits on instance i, leaves the list."""
    inst = world.instance[l, i]
    previous = NONE
    if inst.head == r:
        inst.head = world.req[l, r].next
    else:
        previous = inst.head
        while world.req[l, previous].next != r:
            previous = world.req[l, previous].next
        world.req[l, previous].next = world.req[l, r].next
    if inst.tail == r:
        inst.tail = previous
    inst.waiting -= 1
