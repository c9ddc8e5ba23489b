"""One lane: arrivals, dispatch and the order of events, from one decision to the next.

Events happen in the order of time; at equal times arrivals (by row) come before boundaries of iterations (by
instance), so an iteration that starts at t can serve what arrived at t.
"""

from __future__ import annotations

from servegym.envs.cluster import engine, prefix, sleepers, waiting
from servegym.envs.cluster.kernel import inlined, kernel
from servegym.envs.cluster.scrape import scrape, start_scrape
from servegym.envs.cluster.state import NEVER, NONE

END, DISPATCH = -1, 0
AGENT, ROUND_ROBIN, LEAST_REQUEST = 0, 1, 2
RATE_MEMORY_S = 10.0


@kernel
def restart(world, l, episode):
    """Reset lane l to the start of an episode, with nothing on its instances."""
    lane = world.lane[l]
    e = world.episode[episode]
    lane.episode = episode
    lane.plays += 1
    lane.first_row, lane.rows, lane.fleet = e.first_row, e.rows, e.fleet
    lane.instances = world.fleet_size[e.fleet]
    lane.now = lane.decided_at = lane.accrued_at = lane.last_arrival = 0
    lane.next_row = lane.sleeping = lane.turn = lane.decisions = lane.admissions = 0
    lane.unfinished = e.rows
    lane.pending = lane.default = NONE
    lane.live_weight = lane.cost = lane.gain = lane.arrival_rate = lane.prompt_rate = 0.0
    lane.history_second = 0
    world.history[l, :] = 0.0
    lane.longest_output = e.longest_output
    lane.room = 0
    for i in range(lane.instances):
        lane.room = max(lane.room, _room(world.setting[lane.fleet, i]))
        _restart_instance(world, l, i, e.prefix_tokens)
    for r in range(e.rows):
        req = world.req[l, r]
        req.next = req.instance = NONE
        req.done = req.units = req.preemptions = req.cached = 0
        req.lost = req.order = req.gap = 0
        req.arrived = req.dispatched = req.first = req.finished = req.last = NEVER
    _skip_followers(world, l)


@kernel
def _restart_instance(world, l, i, prefix_tokens):
    inst = world.instance[l, i]
    setting = world.setting[world.lane[l].fleet, i]
    inst.begin = inst.steps = inst.clock = inst.running = inst.fresh = inst.context = 0
    inst.until = inst.next_finish = NEVER
    inst.top = -NEVER
    inst.free = setting.blocks
    inst.part = inst.head = inst.tail = NONE
    inst.part_done = inst.part_goal = inst.waiting = 0
    inst.inflight = inst.prefill_tokens = inst.prompt_tokens = 0
    inst.predicted_tokens = inst.streamed_tokens = inst.preemptions = 0
    world.residue[l, i, :] = 0
    inst.unit_tokens = prefix_tokens
    inst.unit_blocks = prefix_tokens // setting.block_tokens if setting.caching else 0
    if inst.unit_blocks:
        prefix.clear(world, l, i, min(setting.blocks // inst.unit_blocks, world.unit.shape[2]))
    else:
        inst.units = inst.idle_units = 0
    start_scrape(world, l, i)


# --- arrivals ---------------------------------------------------------------------------------------------


@kernel
def _skip_followers(world, l):
    """Move next_row to the next open-loop row; closed-loop turns come from the sleepers."""
    lane = world.lane[l]
    while lane.next_row < lane.rows and world.row[lane.first_row + lane.next_row].arrived == NEVER:
        lane.next_row += 1


@kernel
def _next_arrival(world, l):
    """Time and row of the next arrival, without taking it."""
    lane = world.lane[l]
    at, r = NEVER, NONE
    if lane.next_row < lane.rows:
        at, r = world.row[lane.first_row + lane.next_row].arrived, lane.next_row
    if lane.sleeping:
        first = world.sleeper[l, 0]
        if first.at < at or (first.at == at and first.request < r):
            at, r = first.at, first.request
    return at, r


@kernel
def _take_arrival(world, l, at, r):
    """Request r reaches the router."""
    lane = world.lane[l]
    if r == lane.next_row:
        lane.next_row += 1
        _skip_followers(world, l)
    else:
        sleepers.wake(world, l)
    engine.accrue(lane, at)
    lane.now = at
    row = world.row[lane.first_row + r]
    lane.live_weight += row.weight
    world.req[l, r].arrived = at
    lane.pending = r


@kernel
def fits(world, l, i, r):
    """Whether instance i may get request r: it can hold the prompt and the longest output of the workload.

    A router does not know how long the output will be. The largest instance may get every request.
    """
    lane = world.lane[l]
    tokens = min(world.row[lane.first_row + r].prompt + lane.longest_output, lane.room)
    return tokens <= _room(world.setting[lane.fleet, i])


@inlined
def _room(setting):
    """Tokens that an instance can hold when nothing else is there."""
    return (setting.blocks - setting.watermark) * setting.block_tokens


@kernel
def default_instance(world, l):
    """The default rule for the pending request: fewest requests in flight, lowest index on ties."""
    lane = world.lane[l]
    best, least = NONE, NEVER
    for i in range(lane.instances):
        if world.instance[l, i].inflight < least and fits(world, l, i, lane.pending):
            best, least = i, world.instance[l, i].inflight
    return best


@kernel
def _round_robin(world, l):
    lane = world.lane[l]
    while True:
        i = lane.turn % lane.instances
        lane.turn += 1
        if fits(world, l, i, lane.pending):
            return i


@kernel
def dispatch(world, l, i):
    """The pending request goes to instance i."""
    lane = world.lane[l]
    inst = world.instance[l, i]
    now, r = lane.now, lane.pending
    row = world.row[lane.first_row + r]
    scrape(world, l, i, now)
    world.req[l, r].dispatched = now
    world.req[l, r].instance = i
    lane.pending = NONE
    inst.inflight += 1
    # The router's view: what the prefix cache holds now is not in the queue.
    hit = prefix.match(world, l, i, lane.first_row + r, row.prompt - 1)[0] * inst.unit_tokens
    world.req[l, r].booked = row.prompt - hit
    inst.prefill_tokens += row.prompt - hit
    inst.prompt_tokens += row.prompt
    inst.predicted_tokens += row.predicted
    waiting.enqueue(world, l, i, r)
    if inst.until == NEVER:
        engine.schedule(world, l, i, now, now, 0)
    else:
        engine.cut(world, l, i, now)


# --- the event loop ---------------------------------------------------------------------------------------


@kernel
def advance(world, l, rule):
    """Run lane l until the agent must decide, or to the end of the episode.

    Args:
        rule: AGENT to stop at every dispatch, or a built-in rule that takes all of them.

    Returns:
        DISPATCH with lane.pending and lane.now set, or END when every request has finished.
    """
    lane = world.lane[l]
    while True:
        at, r = _next_arrival(world, l)
        until, i = NEVER, NONE
        for k in range(lane.instances):
            if world.instance[l, k].until < until:
                until, i = world.instance[l, k].until, k
        if at <= until and r != NONE:
            _take_arrival(world, l, at, r)
            if rule == AGENT:
                return DISPATCH
            dispatch(world, l, _round_robin(world, l) if rule == ROUND_ROBIN else default_instance(world, l))
        elif i != NONE:
            lane.now = until
            engine.complete(world, l, i)
        else:
            return END


@kernel
def run_lanes(world, rule):
    """Play every lane's first episode to its end under a built-in rule."""
    for l in range(world.lane.shape[0]):
        restart(world, l, l % world.episode.shape[0])
        advance(world, l, rule)
