"""Closed-loop turns that wait for their time: a heap ordered by (time, request)."""

from __future__ import annotations

from servegym.envs.cluster.kernel import inlined


@inlined
def sleep(world, l, at, r):
    """Heap push: closed-loop turn r arrives at time `at`."""
    heap = world.sleeper
    k = world.lane[l].sleeping
    world.lane[l].sleeping += 1
    while k > 0:
        parent = (k - 1) >> 1
        above = heap[l, parent]
        if above.at < at or (above.at == at and above.request < r):
            break
        heap[l, k].at, heap[l, k].request = above.at, above.request
        k = parent
    heap[l, k].at, heap[l, k].request = at, r


@inlined
def wake(world, l):
    """Heap pop: drop the turn that arrives first."""
    heap = world.sleeper
    world.lane[l].sleeping -= 1
    n = world.lane[l].sleeping
    at, r = heap[l, n].at, heap[l, n].request
    k = 0
    while True:
        child = 2 * k + 1
        if child >= n:
            break
        right = child + 1
        if right < n and (
            heap[l, right].at < heap[l, child].at
            or (heap[l, right].at == heap[l, child].at and heap[l, right].request < heap[l, child].request)
        ):
            child = right
        if at < heap[l, child].at or (at == heap[l, child].at and r < heap[l, child].request):
            break
        heap[l, k].at, heap[l, k].request = heap[l, child].at, heap[l, child].request
        k = child
    heap[l, k].at, heap[l, k].request = at, r
