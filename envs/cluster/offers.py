"""What a question offers to choose from: victims, requests that may move, and pairs of instances.

A question names a few of what may be hundreds: the favourites of published rules, so that each of these rules
can be played and an agent can mix them. Offers stand in `World.offer`, one request a row of the observation.
"""

from __future__ import annotations

import numpy as np

from servegym.envs.cluster.kernel import kernel
from servegym.envs.cluster.migration import bring_up, can_move, default_mover, freeness, is_engaged
from servegym.envs.cluster.running import position
from servegym.envs.cluster.scrape import steps_done
from servegym.envs.cluster.state import FINISH, NEVER, NONE, OFFSET, ORDER, REQUEST

# Rules by which running requests are favoured; the first four choose victims.
NEWEST, LARGEST, MOST_LEFT, LEAST_URGENT, SMALLEST = range(5)
VICTIM_RULES = 4
SOURCES = DESTINATIONS = 4  # most instances on either side of a migration


@kernel
def _offer(world, l, n, r):
    """Offer request r as number n, unless it is offered already; returns how many are offered."""
    for k in range(n):
        if world.offer[l, k] == r:
            return n
    world.offer[l, n] = r
    return n + 1


@kernel
def progress(world, l, i, r):
    """Tokens that request r has streamed, KV tokens it holds on instance i, and 1 if it runs, else 0.

    The KV of a waiting request lies in host memory. Inside a decode stretch both are a step off at most.
    """
    inst = world.instance[l, i]
    at = position(world, l, i, r)
    if at != NONE:
        return _streamed(world, l, i, at), _kv_tokens(world, l, i, at), 1
    req = world.req[l, r]
    if r == inst.part:
        return req.done, inst.part_done, 1
    return req.done, req.hosted, 0


@kernel
def _streamed(world, l, i, at):
    lane, inst = world.lane[l], world.instance[l, i]
    output = world.row[lane.first_row + world.run[l, i, REQUEST, at]].output
    return output - (world.run[l, i, FINISH, at] - inst.clock) + steps_done(inst, lane.now)


@kernel
def _kv_tokens(world, l, i, at):
    inst = world.instance[l, i]
    return world.run[l, i, OFFSET, at] + inst.clock - 1 + steps_done(inst, world.lane[l].now)


# --- running requests by rule -----------------------------------------------------------------------------


@kernel
def _running_request(world, l, i, at):
    """The request at position `at`; behind the decoding ones stands the partly computed prompt."""
    inst = world.instance[l, i]
    return world.run[l, i, REQUEST, at] if at < inst.running else inst.part


@kernel
def _key(world, l, i, rule, at):
    """What the rule compares: it favours the largest key, of equals the last admitted.

    The partial prompt counts as the last admitted, as for the engine.
    """
    inst = world.instance[l, i]
    r = _running_request(world, l, i, at)
    row, req = world.row[world.lane[l].first_row + r], world.req[l, r]
    if rule == LEAST_URGENT:
        return row.priority, req.arrived, r
    decodes = at < inst.running
    admitted = world.run[l, i, ORDER, at] if decodes else NEVER
    if rule == NEWEST:
        return admitted, 0, 0
    if rule in (LARGEST, SMALLEST):
        tokens = _kv_tokens(world, l, i, at) if decodes else inst.part_done
        return tokens if rule == LARGEST else -tokens, admitted, 0
    left = max(row.predicted - (_streamed(world, l, i, at) if decodes else req.done), 0)
    return left, admitted, 0


@kernel
def _favoured(world, l, i, rule, a, b):
    """Of positions a and b, which may be NONE, the one that the rule favours."""
    if b == NONE or (a != NONE and _key(world, l, i, rule, a) > _key(world, l, i, rule, b)):
        return a
    return b


@kernel
def _favourite(world, l, i, rule, other):
    """Position of the running request that the rule favours, `other` left out."""
    inst = world.instance[l, i]
    best = NONE
    for at in range(inst.running + (inst.part != NONE)):
        if at != other:
            best = _favoured(world, l, i, rule, at, best)
    return best


@kernel
def offer_victims(world, l, i):
    """Offer requests that instance i, which runs at least two, may preempt: two favourites of each rule.

    The rules: newest admission, largest KV, most predicted output left, lowest priority.

    Returns:
        how many there are; the engine's default victim is one of them.
    """
    n = 0
    for rule in range(VICTIM_RULES):
        first = _favourite(world, l, i, rule, NONE)
        second = _favourite(world, l, i, rule, first)
        n = _offer(world, l, n, _running_request(world, l, i, first))
        n = _offer(world, l, n, _running_request(world, l, i, second))
    return n


# --- migration --------------------------------------------------------------------------------------------


@kernel
def offer_movers(world, l, s, d):
    """Offer requests of instance s that may move to d: the default one, then the favourites of some rules.

    The rules: of those that decode the smallest KV, the largest, the most predicted output left and the last
    admitted; then the tail and the head of the waiting list.

    Returns:
        how many there are.
    """
    inst = world.instance[l, s]
    n = 0
    default = default_mover(world, l, s)
    if default != NONE and can_move(world, l, s, d, default):
        n = _offer(world, l, n, default)
    smallest, largest, most_left, newest = NONE, NONE, NONE, NONE
    for at in range(inst.running):
        if can_move(world, l, s, d, world.run[l, s, REQUEST, at]):
            smallest = _favoured(world, l, s, SMALLEST, at, smallest)
            largest = _favoured(world, l, s, LARGEST, at, largest)
            most_left = _favoured(world, l, s, MOST_LEFT, at, most_left)
            newest = _favoured(world, l, s, NEWEST, at, newest)
    for at in (smallest, largest, most_left, newest):
        if at != NONE:
            n = _offer(world, l, n, world.run[l, s, REQUEST, at])
    for r in (inst.tail, inst.head):
        if r != NONE and can_move(world, l, s, d, r):
            n = _offer(world, l, n, r)
    return n


@kernel
def is_legal_pair(world, l, s, d):
    """Whether any request that `offer_movers` would offer may move from instance s to d."""
    inst = world.instance[l, s]
    for r in (default_mover(world, l, s), inst.tail, inst.head):
        if r != NONE and can_move(world, l, s, d, r):
            return True
    for at in range(inst.running):  # noqa: SIM110 (numba would allocate for a generator)
        if can_move(world, l, s, d, world.run[l, s, REQUEST, at]):
            return True
    return False


@kernel
def _is_paired(world, l, i):
    """Whether instance i took part in a pair at this tick."""
    return world.instance[l, i].paired == world.lane[l].now


@kernel
def _drains(world, l, i):
    return world.lane[l].now >= world.setting[world.lane[l].fleet, i].drain


@kernel
def _may_give(world, l, i):
    """Whether something on instance i may move: it waits, or it decodes and no migration is in flight."""
    inst = world.instance[l, i]
    decodes = inst.running > 0 and not is_engaged(inst)
    return not _is_paired(world, l, i) and (inst.waiting > 0 or decodes)


@kernel
def _may_take(world, l, i):
    return not _is_paired(world, l, i) and not _drains(world, l, i)


@kernel
def _source_key(world, l, i):
    """Sources come in this order, smallest first: draining ones, then the least free."""
    return (0.0 if _drains(world, l, i) else 1.0), world.instance[l, i].freeness, float(i)


@kernel
def _destination_key(world, l, i):
    """Destinations come in this order, smallest first: the freest; those engaged, which take no KV, last."""
    inst = world.instance[l, i]
    busy = is_engaged(inst) or inst.joiner != NONE
    return (1.0 if busy else 0.0), -inst.freeness, float(i)


@kernel
def next_source(world, l, previous):
    """The source that is offered after instance `previous`, the first after NONE; NONE behind the last."""
    best = NONE
    for i in range(world.lane[l].instances):
        if not _may_give(world, l, i):
            continue
        key = _source_key(world, l, i)
        later = previous == NONE or key > _source_key(world, l, previous)
        if later and (best == NONE or key < _source_key(world, l, best)):
            best = i
    return best


@kernel
def next_destination(world, l, previous):
    """The destination that is offered after instance `previous`, as `next_source`."""
    best = NONE
    for i in range(world.lane[l].instances):
        if not _may_take(world, l, i):
            continue
        key = _destination_key(world, l, i)
        later = previous == NONE or key > _destination_key(world, l, previous)
        if later and (best == NONE or key < _destination_key(world, l, best)):
            best = i
    return best


@kernel
def offer_sources(world, l):
    """Offer the migration's sources, each as the request that would go by default.

    While a migration is in flight nothing that decodes may go: then it is the tail of the waiting list.

    Returns:
        how many there are; their freeness, and that of all instances, is up to date.
    """
    for i in range(world.lane[l].instances):
        bring_up(world, l, i)
        world.instance[l, i].freeness = freeness(world, l, i)
    n, s = 0, next_source(world, l, NONE)
    while s != NONE and n < SOURCES:
        inst = world.instance[l, s]
        world.offer[l, n] = inst.tail if is_engaged(inst) else default_mover(world, l, s)
        n, s = n + 1, next_source(world, l, s)
    return n


@kernel
def source_of(world, l, a):
    """The instance of the source that is offered as number a."""
    return np.int64(world.req[l, world.offer[l, a]].instance)


@kernel
def has_pair(world, l):
    """Whether any pair of instances that would be offered now is legal."""
    for a in range(offer_sources(world, l)):
        s = source_of(world, l, a)
        d = next_destination(world, l, NONE)
        for _ in range(DESTINATIONS):
            if d == NONE:
                break
            if is_legal_pair(world, l, s, d):
                return True
            d = next_destination(world, l, d)
    return False
