"""One instance: vLLM v1's scheduler as numba kernels, decode stretches in closed form.

An iteration schedules, in this order, under a token budget (vLLM v1, `Scheduler.schedule`):

1. every decoding request, one token each, and the one prompt that is partly computed, as many tokens as the
   budget leaves. While their new blocks do not fit, a running request is preempted: by default the last
   admitted under FCFS, the largest (priority, arrival) under priorities. An agent may be asked instead.
2. the request that has migrated here, if its next token fits.
3. if nothing was preempted: waiting requests in order, while there is budget, a free sequence and room for
   their blocks; the first that does not fit stops the admission.

Of the token budget prompts get at most `cap`, which an agent may lower to keep iterations short.

With asynchronous scheduling (vLLM v1's default) the next iteration is chosen while one runs: requests that
finish with the one keep their memory and their sequences until the next has been chosen, and a request that
arrives meanwhile waits one iteration more.

While an instance only decodes, nothing changes but its clock: the engine jumps over the whole stretch, up to
the first finish or block shortage, and cuts it when something happens to it: an arrival, a migration.

Simplifications, shared with the reference: decodes come before the partial prompt whatever their order of
admission (the same thing under FCFS, where the partial prompt is the last). With priorities the rest of the
batch goes on when a request preempts itself (vLLM leaves the requests behind it out of that step).
Asynchronously, a request that just finishes is never the one preempted, and with priorities one that arrived
too late holds back those behind it.
"""

from __future__ import annotations

from servegym.envs.cluster import migration, prefix, sleepers
from servegym.envs.cluster.kernel import inlined, kernel
from servegym.envs.cluster.memory import (
    blocks_of,
    book_steps,
    give_back,
    setting_of,
    steps_within,
)
from servegym.envs.cluster.preemption import default_victim, preempt, swap_ps
from servegym.envs.cluster.running import join, leave
from servegym.envs.cluster.scrape import scrape
from servegym.envs.cluster.state import (
    FINISH,
    GAP,
    NEVER,
    NOBODY,
    NONE,
    OFFSET,
    ORDER,
    PREEMPT,
    PS,
    REQUEST,
    STOPPING,
)
from servegym.envs.costs.model import iteration_ps, prefill_ps, stretch_ps

_SYNCHRONOUS, _ASYNCHRONOUS = 1, 2  # which of its calls of the scheduler a boundary is at


@kernel
def _finish(world, l, i, at, now):
    """The request at position `at`, which is returned, has streamed its last token; it keeps its KV."""
    lane = world.lane[l]
    inst = world.instance[l, i]
    r = world.run[l, i, REQUEST, at]
    row = world.row[lane.first_row + r]
    req = world.req[l, r]
    req.finished = now
    req.done = row.output
    req.gap = world.run[l, i, GAP, at]
    leave(world, l, i, at)
    if r == inst.out:
        migration.abort(world, l, i, now)
    inst.inflight -= 1
    inst.urgent -= row.priority < lane.least_urgent
    inst.prompt_tokens -= row.prompt
    inst.predicted_tokens -= row.predicted
    inst.streamed_tokens -= row.output
    accrue(lane, now)
    lane.live_weight -= row.weight
    lane.unfinished -= 1
    ttft = (req.first - req.arrived) / PS
    tpot = (now - req.first) / PS / max(row.output - 1, 1)
    if ttft <= row.slo_ttft and tpot <= row.slo_tpot:
        lane.gain += row.weight
    if row.next_turn != NONE:
        sleepers.sleep(world, l, now + world.row[lane.first_row + row.next_turn].gap, row.next_turn)
    return r


@inlined
def accrue(lane, now):
    """Bring the integral of the weight in the system up to now."""
    lane.cost += lane.live_weight * ((now - lane.accrued_at) / PS)
    lane.accrued_at = now


# --- the scheduler ----------------------------------------------------------------------------------------


@inlined
def _make_room(world, l, i, now):
    """Preempt until the running requests' next tokens fit; take their blocks.

    Returns:
        the partial prompt's chunk in tokens, or NONE where the agent is asked who gives way.
    """
    lane = world.lane[l]
    inst = world.instance[l, i]
    setting = setting_of(world, l, i)
    while True:
        need = world.residue[l, i, (-inst.clock) % setting.block_tokens] if inst.running else 0
        chunk = 0
        if inst.part != NONE:
            chunk = min(inst.part_goal - inst.part_done, min(inst.cap, setting.budget - inst.running))
            need += blocks_of(setting.block_tokens, inst.part_done + chunk)
            need -= blocks_of(setting.block_tokens, inst.part_done)
        if need <= inst.free:
            break
        if lane.raises >> PREEMPT & 1 and inst.running + (inst.part != NONE) > 1:
            lane.question, lane.asker = PREEMPT, i
            return NONE
        preempt(world, l, i, default_victim(world, l, i), setting.by_swap, now)
    inst.free -= need
    return chunk


@inlined
def _decode_next(world, l, i, r, goal):
    """Request r, whose `goal` tokens are all known, decodes from the next iteration on."""
    inst = world.instance[l, i]
    run = world.run
    at = inst.running + inst.fresh
    inst.fresh += 1
    # With one token more than it computes now.
    run[l, i, REQUEST, at] = r
    run[l, i, OFFSET, at] = goal - inst.clock
    output = world.row[world.lane[l].first_row + r].output
    run[l, i, FINISH, at] = inst.clock + output - world.req[l, r].done
    run[l, i, GAP, at] = world.req[l, r].gap
    run[l, i, ORDER, at] = world.req[l, r].order


@inlined
def _compute_prompt(world, l, i, r, past, chunk, goal):
    """Request r computes `chunk` prompt tokens behind `past` in this iteration."""
    inst = world.instance[l, i]
    lane = world.lane[l]
    prefix.publish(world, l, i, r, lane.first_row + r, past + chunk)
    if past + chunk < goal:
        inst.part, inst.part_done, inst.part_goal = r, past + chunk, goal
        return
    inst.part = NONE
    _decode_next(world, l, i, r, goal)


@inlined
def _join_migrated(world, l, i):
    """The request that has migrated here computes its next token, if there is room.

    Its sequence has been kept free for it since the migration began.

    Returns:
        its KV tokens so far, or 0 where nobody joins.
    """
    inst = world.instance[l, i]
    lane = world.lane[l]
    r, tokens = inst.joiner, inst.joiner_kv
    need = blocks_of(setting_of(world, l, i).block_tokens, tokens + 1) - inst.joiner_blocks
    if need > inst.free:
        return 0
    inst.free -= need
    inst.joiner = NONE
    if inst.unit_blocks:
        prefix.evict(world, l, i)
    prefix.publish(world, l, i, r, lane.first_row + r, tokens + 1)
    _take_order(world, l, r)
    _decode_next(world, l, i, r, tokens + 1)
    return tokens


@inlined
def _take_order(world, l, r):
    """Request r is the last admitted."""
    world.req[l, r].order = world.lane[l].admissions
    world.lane[l].admissions += 1


@kernel
def _admit(world, l, i, budget):
    """Admit the head of the waiting list if it fits.

    Returns:
        new tokens it computes in this iteration and their number of past tokens; (0, 0) where it stays.
    """
    inst = world.instance[l, i]
    lane = world.lane[l]
    setting = setting_of(world, l, i)
    r = inst.head
    row = lane.first_row + r
    req = world.req[l, r]
    goal = world.row[row].prompt + req.done
    hits, idle = prefix.match(world, l, i, row, goal - 1)
    past = max(hits * inst.unit_tokens, req.hosted)
    chunk = min(goal - past, budget)
    held = hits * inst.unit_blocks
    reserve = goal if setting.reserve else past + chunk
    if (
        blocks_of(setting.block_tokens, reserve) - held + idle * inst.unit_blocks
        > inst.free - setting.watermark
    ):
        return 0, 0
    inst.head = req.next
    if inst.head == NONE:
        inst.tail = NONE
    inst.waiting -= 1
    prefix.hold_matched(world, l, i, r, row, hits)
    inst.free -= blocks_of(setting.block_tokens, past + chunk) - held
    prefix.evict(world, l, i)
    if req.hosted:
        _swap_in(world, l, i, r, hits)
    elif req.preemptions == 0:
        req.cached = past
    else:
        req.lost -= past
    _take_order(world, l, r)
    _compute_prompt(world, l, i, r, past, chunk, goal)
    return chunk, past


@inlined
def _swap_in(world, l, i, r, hits):
    """What request r has on the host comes back, except for what the prefix cache holds."""
    inst = world.instance[l, i]
    setting = setting_of(world, l, i)
    tokens = world.req[l, r].hosted
    blocks = blocks_of(setting.block_tokens, tokens)
    if tokens > hits * inst.unit_tokens:
        inst.copying += swap_ps(setting, blocks - hits * inst.unit_blocks)
    inst.host_free += blocks
    world.req[l, r].hosted = 0


@inlined
def _may_fit_later(inst, setting):
    """Whether the head of the waiting list, which does not fit now, may fit as the running requests grow.

    Their growth takes memory, so it cannot, but for one case: without a reserved prompt, the eviction of an
    idle prefix that the head would hold makes its first chunk need less.
    """
    return inst.head != NONE and inst.unit_blocks > 0 and not setting.reserve


@inlined
def _unseen(world, l, i, seen):
    """Whether the head of the waiting list arrived after `seen`."""
    inst = world.instance[l, i]
    return inst.head != NONE and world.req[l, inst.head].arrived > seen


@kernel
def schedule(world, l, i, now, seen, leaving):
    """Choose what instance i computes next and when that ends.

    Args:
        seen: requests that arrived later are not admitted yet.
        leaving: requests that have finished and still hold their memory.

    Returns:
        True where nothing was chosen, because the agent is asked who gives way.
    """
    inst = world.instance[l, i]
    setting = setting_of(world, l, i)
    p = setting.profile
    inst.begin = now
    inst.fresh = 0
    attention = 0
    before = inst.free
    chunk = _make_room(world, l, i, now)
    if chunk == NONE:
        return True
    if inst.unit_blocks:
        prefix.evict(world, l, i)
    tokens = sequences = inst.running
    budget = min(setting.budget, tokens + inst.cap)
    longest = chunk
    if chunk:
        attention += prefill_ps(world.tables, p, chunk, inst.part_done)
        tokens += chunk
        sequences += 1
        _compute_prompt(world, l, i, inst.part, inst.part_done, chunk, inst.part_goal)
    if inst.joiner != NONE and tokens < budget:
        past = _join_migrated(world, l, i)
        if past:
            attention += prefill_ps(world.tables, p, 1, past)
            longest = max(longest, 1)
            tokens += 1
            sequences += 1
    reserved = inst.inbound != NONE or inst.joiner != NONE
    while (
        not inst.preempted
        and inst.head != NONE
        and tokens < budget
        and inst.part == NONE
        and sequences + leaving + reserved < setting.max_seqs
        and not _unseen(world, l, i, seen)
    ):
        chunk, past = _admit(world, l, i, budget - tokens)
        if chunk == 0:
            break
        attention += prefill_ps(world.tables, p, chunk, past)
        longest = max(longest, chunk)
        tokens += chunk
        sequences += 1
    n = inst.running
    top = inst.top + inst.clock
    inst.booked_steps = 1
    if tokens == 0:
        inst.steps, inst.until, inst.booked_steps = 0, NEVER, 0
    elif (
        tokens == n
        and not inst.preempted
        and not leaving
        and not _unseen(world, l, i, seen)
        and not _may_fit_later(inst, setting)
        and not migration.is_engaged(inst)
        and inst.joiner == NONE
    ):
        inst.steps = steps_within(world, l, i, before, inst.next_finish - inst.clock)
        inst.until = now + stretch_ps(world.tables, p, n, inst.context, top, inst.steps)
    else:
        inst.steps = 1
        ps = iteration_ps(world.tables, p, n, inst.context, top, tokens, sequences, attention, longest)
        if migration.is_engaged(inst):
            ps += ps * world.episode[world.lane[l].episode].slowdown // 1_000_000
        inst.until = now + ps
    if inst.copying:
        _wait_for_copies(world, l, i, now)
    return False


@inlined
def _wait_for_copies(world, l, i, now):
    """The swaps of this iteration take the instance's link; it waits for the part that is not hidden."""
    inst = world.instance[l, i]
    inst.link_until = max(now, inst.link_until) + inst.copying
    inst.copying = 0
    if inst.until != NEVER:
        inst.until += (inst.link_until - now) * (1000 - setting_of(world, l, i).overlap) // 1000


@inlined
def _last_step_ps(world, l, i):
    """Duration of the last, longest, iteration of what is in flight."""
    inst = world.instance[l, i]
    if inst.steps <= 1:
        return inst.until - inst.begin
    context = inst.context + (inst.steps - 1) * inst.running
    top = inst.top + inst.clock + inst.steps - 1
    return stretch_ps(world.tables, setting_of(world, l, i).profile, inst.running, context, top, 1)


@inlined
def _first_tokens(world, l, i, now):
    """The prompts that this iteration completed stream a token and decode from now on."""
    inst = world.instance[l, i]
    for at in range(inst.running, inst.running + inst.fresh):
        r = world.run[l, i, REQUEST, at]
        req = world.req[l, r]
        if req.first == NEVER:
            req.first = now
            inst.prefill_tokens -= req.booked
        else:
            world.run[l, i, GAP, at] = max(world.run[l, i, GAP, at], now - req.last)
        join(world, l, i, at)
    inst.streamed_tokens += inst.fresh
    inst.running += inst.fresh
    inst.fresh = 0


@inlined
def _finish_due(world, l, i, now):
    """Finish the requests that are done, in the order of their numbers.

    Returns:
        how many, and the first; `next` leads to the others.
    """
    inst = world.instance[l, i]
    count, first, last = 0, NONE, NONE
    requests, finishes = world.run[l, i, REQUEST], world.run[l, i, FINISH]
    while inst.next_finish <= inst.clock:
        due = NONE
        for k in range(inst.running):
            if finishes[k] == inst.next_finish and (due == NONE or requests[k] < requests[due]):
                due = k
        r = _finish(world, l, i, due, now)
        if last == NONE:
            first = r
        else:
            world.req[l, last].next = r
        world.req[l, r].next = NONE
        count, last = count + 1, r
    return count, first


@inlined
def _drop_finished(world, l, i, r):
    """Request r and those that `next` leads to give back their KV."""
    while r != NONE:
        row = world.row[world.lane[l].first_row + r]
        give_back(world, l, i, r, row.prompt + row.output - 1)
        r = world.req[l, r].next


@inlined
def settle(world, l, i):
    """Schedule instance i, which stands at a boundary, from where a question has interrupted it.

    Returns:
        True where the next question interrupts it.
    """
    inst = world.instance[l, i]
    now = world.lane[l].now
    if inst.phase == _ASYNCHRONOUS:
        if schedule(world, l, i, now, inst.seen, inst.leaving_count):
            return True
        inst.preempted = 0
        inst.phase = _SYNCHRONOUS
    _drop_finished(world, l, i, inst.leaving)
    inst.leaving, inst.leaving_count = NONE, NOBODY
    if inst.until == NEVER and schedule(world, l, i, now, now, NOBODY):
        return True
    inst.phase = 0
    return False


@kernel
def complete(world, l, i):
    """What instance i had in flight ends: tokens stream, requests finish, the next iteration starts.

    Returns:
        True where a question interrupts it, as in `settle`.
    """
    inst = world.instance[l, i]
    now = inst.until
    scrape(world, l, i, now)
    n, steps = inst.running, inst.steps
    gap = _last_step_ps(world, l, i)
    if n:
        gaps = world.run[l, i, GAP]
        for k in range(n):
            gaps[k] = max(gaps[k], gap)
        book_steps(world, l, i)
        inst.context += n * steps
        inst.streamed_tokens += n * steps
    inst.clock += steps
    inst.steps = inst.booked_steps = 0
    if inst.fresh:
        _first_tokens(world, l, i, now)
    inst.leaving_count, inst.leaving = _finish_due(world, l, i, now)
    if inst.out != NONE and inst.out_phase == STOPPING:
        migration.stop(world, l, i, now)
    inst.until = NEVER
    inst.seen = now - gap
    inst.preempted = 0
    inst.phase = _ASYNCHRONOUS if setting_of(world, l, i).asynchronous else _SYNCHRONOUS
    return settle(world, l, i)


@kernel
def set_cap(world, l, i, cap):
    """From the next iteration on prompts get at most `cap` tokens of instance i's budget."""
    migration.bring_up(world, l, i)
    world.instance[l, i].cap = cap
