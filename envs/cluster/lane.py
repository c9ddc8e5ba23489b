"""One lane: arrivals, questions and the order of events, from one question to the next.

Events happen in the order of time; at equal times arrivals (by row) come first, then ends of copies, the
migration tick, the budget tick, and boundaries of iterations (each by instance), so an iteration that starts
at t can serve what arrived at t. Ticks count only while something else is still to come.
"""

from __future__ import annotations

from servegym.envs.cluster import engine, migration, prefix, sleepers, waiting
from servegym.envs.cluster.kernel import inlined, kernel
from servegym.envs.cluster.memory import fits, room
from servegym.envs.cluster.running import cut
from servegym.envs.cluster.scrape import scrape, start_scrape
from servegym.envs.cluster.state import BUDGET, DISPATCH, END, MIGRATE, MOVE, NEVER, NOBODY, NONE

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
    lane.longest_output, lane.least_urgent = e.longest_output, e.least_urgent
    lane.question = lane.asker = lane.target = lane.pairs = lane.budget_turn = NONE
    lane.moving = 0
    lane.next_migrate = e.migrate_period if e.migrate_period else NEVER
    lane.next_budget = e.budget_period if e.budget_period else NEVER
    lane.room = 0
    for i in range(lane.instances):
        if world.setting[lane.fleet, i].drain == NEVER:
            lane.room = max(lane.room, room(world.setting[lane.fleet, i]))
        _restart_instance(world, l, i, e.prefix_tokens)
    for r in range(e.rows):
        req = world.req[l, r]
        req.next = req.instance = NONE
        req.done = req.units = req.preemptions = req.cached = 0
        req.lost = req.order = req.gap = req.hosted = req.migrations = 0
        req.arrived = req.dispatched = req.first = req.finished = req.last = NEVER
    _skip_followers(world, l)


@kernel
def _restart_instance(world, l, i, prefix_tokens):
    inst = world.instance[l, i]
    setting = world.setting[world.lane[l].fleet, i]
    inst.begin = inst.steps = inst.clock = inst.running = inst.fresh = inst.context = 0
    inst.booked_steps = inst.phase = inst.preempted = inst.leaving_count = inst.seen = 0
    inst.until = inst.next_finish = inst.out_until = NEVER
    inst.leaving = inst.out = inst.inbound = inst.joiner = inst.paired = NONE
    inst.copying = inst.link_until = inst.urgent = 0
    inst.host_free, inst.cap = setting.host_blocks, setting.budget
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


@inlined
def _skip_followers(world, l):
    """Move next_row to the next open-loop row; closed-loop turns come from the sleepers."""
    lane = world.lane[l]
    while lane.next_row < lane.rows and world.row[lane.first_row + lane.next_row].arrived == NEVER:
        lane.next_row += 1


@inlined
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


@inlined
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


@inlined
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
    lane.pending = lane.question = NONE
    inst.inflight += 1
    inst.urgent += row.priority < lane.least_urgent
    # The router's view: what the prefix cache holds now is not in the queue.
    hit = prefix.match(world, l, i, lane.first_row + r, row.prompt - 1)[0] * inst.unit_tokens
    world.req[l, r].booked = row.prompt - hit
    inst.prefill_tokens += row.prompt - hit
    inst.prompt_tokens += row.prompt
    inst.predicted_tokens += row.predicted
    waiting.enqueue(world, l, i, r)
    if inst.until == NEVER:
        engine.schedule(world, l, i, now, now, NOBODY)
    else:
        cut(world, l, i, now)


# --- ticks ------------------------------------------------------------------------------------------------


@kernel
def take_pair(world, l, s, d):
    """At a migration tick a request of instance s shall go to d: which one is the next question."""
    lane = world.lane[l]
    world.instance[l, s].paired = world.instance[l, d].paired = lane.now
    lane.pairs += 1
    lane.question, lane.asker, lane.target = MOVE, s, d


@kernel
def move(world, l, r):
    """Request r goes from the chosen source to the chosen destination."""
    lane = world.lane[l]
    migration.move(world, l, lane.asker, lane.target, r)
    lane.question = lane.asker = lane.target = NONE


@kernel
def close_tick(world, l):
    """No more migration at this tick."""
    lane = world.lane[l]
    lane.pairs = lane.question = NONE


@inlined
def _has_mixed_work(inst):
    """Whether the instance has decodes and prompts that share its iterations."""
    return inst.running > 0 and (inst.waiting > 0 or inst.part != NONE)


@kernel
def _next_budget_question(world, l):
    """Raise the question for the next instance of this budget tick that has both kinds of work."""
    lane = world.lane[l]
    for i in range(lane.budget_turn, lane.instances):
        if _has_mixed_work(world.instance[l, i]):
            lane.question, lane.asker = BUDGET, i
            lane.budget_turn = i + 1
            return True
    lane.budget_turn = lane.question = lane.asker = NONE
    return False


# --- the event loop ---------------------------------------------------------------------------------------


@kernel
def advance(world, l, rule):
    """Run lane l until the agent must decide, or to the end of the episode.

    Args:
        rule: AGENT to stop at every dispatch, or a built-in rule that takes all of them.

    Returns:
        the kind of the open question, as in lane.question, at lane.now; END when every request has finished.
    """
    lane = world.lane[l]
    if lane.asker != NONE and world.instance[l, lane.asker].phase and engine.settle(world, l, lane.asker):
        return lane.question
    while True:
        if lane.pairs != NONE:
            if lane.pairs < lane.instances // 2:
                lane.question = MIGRATE
                return lane.question
            close_tick(world, l)
        if lane.budget_turn != NONE and _next_budget_question(world, l):
            return lane.question
        at, r = _next_arrival(world, l)
        until, i = NEVER, NONE
        for k in range(lane.instances):
            if world.instance[l, k].until < until:
                until, i = world.instance[l, k].until, k
        tick = min(lane.next_migrate, lane.next_budget)
        if (lane.moving or tick <= min(at, until)) and _other_event(world, l, at, until, tick):
            continue
        if at <= until and r != NONE:
            _take_arrival(world, l, at, r)
            if rule == AGENT:
                lane.question = DISPATCH
                return lane.question
            dispatch(world, l, _round_robin(world, l) if rule == ROUND_ROBIN else default_instance(world, l))
        elif i != NONE:
            lane.now = until
            if engine.complete(world, l, i):
                return lane.question
        else:
            return END


@kernel
def _other_event(world, l, at, until, tick):
    """Let the next end of a copy, or tick, happen, where it comes before arrivals and boundaries.

    Returns:
        whether one did.
    """
    lane = world.lane[l]
    copied, s = NEVER, NONE
    if lane.moving:
        for k in range(lane.instances):
            if world.instance[l, k].out_until < copied:
                copied, s = world.instance[l, k].out_until, k
    nothing_to_come = min(at, min(copied, until)) == NEVER
    soonest = min(copied, tick)
    if nothing_to_come or at <= soonest or until < soonest:
        return False
    if copied <= tick:
        lane.now = copied
        migration.copy_ended(world, l, s)
        return True
    lane.now = tick
    episode = world.episode[lane.episode]
    if lane.next_migrate <= lane.next_budget:
        lane.next_migrate += episode.migrate_period
        if lane.raises >> MIGRATE & 1:
            lane.pairs = 0
    else:
        lane.next_budget += episode.budget_period
        if lane.raises >> BUDGET & 1:
            lane.budget_turn = 0
    return True


@kernel
def run_lanes(world, rule):
    """Play every lane's first episode to its end under a built-in rule."""
    for l in range(world.lane.shape[0]):
        restart(world, l, l % world.episode.shape[0])
        advance(world, l, rule)
