"""What a question offers to choose from: victims, requests that may move, and pairs of instances.

A question names a few of what may be hundreds: the favourites of published rules, so that each of these rules
can be played and an agent can mix them. Offers stand in `World.offer`, one request a row of the observation,
and where requests may move to in `World.receiver`; NONE stands behind the last.
"""

from __future__ import annotations

import numpy as np

from servegym.envs.cluster.kernel import kernel
from servegym.envs.cluster.migration import (
    bring_up,
    can_move,
    can_move_waiting,
    default_mover,
    freeness,
    has_room,
    is_engaged,
    may_join,
)
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
    world.offer[l, :] = NONE
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
    world.offer[l, :] = NONE
    default = default_mover(world, l, s)
    if default != NONE and can_move(world, l, s, d, default):
        n = _offer(world, l, n, default)
    smallest, largest, most_left, newest = NONE, NONE, NONE, NONE
    for at in range(inst.running if may_join(world, l, s, d) else 0):
        if has_room(world, l, s, d, at):
            smallest = _favoured(world, l, s, SMALLEST, at, smallest)
            largest = _favoured(world, l, s, LARGEST, at, largest)
            most_left = _favoured(world, l, s, MOST_LEFT, at, most_left)
            newest = _favoured(world, l, s, NEWEST, at, newest)
    for at in (smallest, largest, most_left, newest):
        if at != NONE:
            n = _offer(world, l, n, world.run[l, s, REQUEST, at])
    for r in (inst.tail, inst.head):
        if r != NONE and can_move_waiting(world, l, s, d, r):
            n = _offer(world, l, n, r)
    return n


@kernel
def is_legal_pair(world, l, s, d):
    """Whether any request that `offer_movers` would offer may move from instance s to d."""
    inst = world.instance[l, s]
    for r in (inst.tail, inst.head):
        if r != NONE and can_move_waiting(world, l, s, d, r):
            return True
    if may_join(world, l, s, d):
        for at in range(inst.running):
            if has_room(world, l, s, d, at):
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
def _precedes(world, l, a, b, as_source):
    """Whether instance a > b is offered before b.

    Sources: draining ones, then the least free. Destinations: the freest; those engaged, which take no KV,
    last.
    """
    one, other = world.instance[l, a], world.instance[l, b]
    if as_source:
        first, second = _drains(world, l, a), _drains(world, l, b)
        return first if first != second else one.freeness < other.freeness
    first, second = is_engaged(one) or one.joiner != NONE, is_engaged(other) or other.joiner != NONE
    return second if first != second else one.freeness > other.freeness


@kernel
def _rank(world, l, chosen, as_source):
    """Let `chosen`, int32, be the instances that come first as sources or as destinations, then NONE."""
    n = 0
    for i in range(world.lane[l].instances):
        if not (_may_give(world, l, i) if as_source else _may_take(world, l, i)):
            continue
        if n < len(chosen):
            n += 1
        elif not _precedes(world, l, i, chosen[n - 1], as_source):
            continue
        k = n - 1
        while k > 0 and _precedes(world, l, i, chosen[k - 1], as_source):
            chosen[k] = chosen[k - 1]
            k -= 1
        chosen[k] = i
    chosen[n:] = NONE


@kernel
def offer_pairs(world, l):
    """Offer the migration's destinations, and its sources, each as the request that would go by default.

    While a migration is in flight nothing that decodes may go: then it is the tail of the waiting list.

    Returns:
        whether any pair is legal.
    """
    lane = world.lane[l]
    if lane.pairs == 0:  # the first question of a tick; later ones leave out what has changed since
        for i in range(lane.instances):
            bring_up(world, l, i)
            world.instance[l, i].freeness = freeness(world, l, i)
    sources, receivers = world.offer[l, :SOURCES], world.receiver[l]
    _rank(world, l, sources, True)
    _rank(world, l, receivers, False)
    found = False
    for a in range(SOURCES):
        s = np.int64(sources[a])
        if s == NONE:
            break
        for b in range(DESTINATIONS):
            found = found or (receivers[b] != NONE and is_legal_pair(world, l, s, np.int64(receivers[b])))
        inst = world.instance[l, s]
        sources[a] = inst.tail if is_engaged(inst) else default_mover(world, l, s)
    return found


@kernel
def source_of(world, l, a):
    """The instance of the source that is offered as number a."""
    return np.int64(world.req[l, world.offer[l, a]].instance)
