"""One instance: vLLM v1's scheduler as numba kernels, decode stretches in closed form.

An iteration schedules, in this order, under a token budget (vLLM v1, `Scheduler.schedule`):

1. every decoding request, one token each, and the one prompt that is partly computed, as many tokens as the
   budget leaves. While their new blocks do not fit, the worst running request is preempted: the last
   admitted under FCFS, the largest (priority, arrival) under priorities. It loses its KV (recompute).
2. if nothing was preempted: waiting requests in order, while there is budget, a free sequence and room for
   their blocks; the first that does not fit stops the admission.

With asynchronous scheduling (vLLM v1's default) the next iteration is chosen while one runs: requests that
finish with the one keep their memory and their sequences until the next has been chosen, and a request that
arrives meanwhile waits one iteration more.

While an instance only decodes, nothing changes but its clock: the engine jumps over the whole stretch, up to
the first finish or block shortage, and cuts it when a request arrives. Per request it keeps numbers that do
not change as the clock runs (clock at the finish, length minus clock), so a step costs nothing per request.

Simplifications, shared with the reference: decodes come before the partial prompt whatever their order of
admission (the same thing under FCFS, where the partial prompt is the last). With priorities the rest of the
batch goes on when a request preempts itself (vLLM leaves the requests behind it out of that step).
Asynchronously, a request that just finishes is never the one preempted, and with priorities one that arrived
too late holds back those behind it.
"""

from __future__ import annotations

from servegym.envs.cluster import prefix, sleepers, waiting
from servegym.envs.cluster.kernel import inlined, kernel
from servegym.envs.cluster.scrape import scrape
from servegym.envs.cluster.state import (
    FINISH,
    GAP,
    NEVER,
    NONE,
    OFFSET,
    ORDER,
    PS,
    REQUEST,
)
from servegym.envs.costs.model import iteration_ps, prefill_ps, steps_to_reach, stretch_ps


@inlined
def blocks_of(inst_block_tokens, tokens):
    """Blocks that hold so many tokens."""
    return (tokens + inst_block_tokens - 1) // inst_block_tokens


@inlined
def _setting(world, l, i):
    return world.setting[world.lane[l].fleet, i]


# --- decoding requests ------------------------------------------------------------------------------------


@inlined
def _join(world, l, i, at):
    """The request at position `at` of the run arrays starts to decode."""
    inst = world.instance[l, i]
    run = world.run
    offset = run[l, i, OFFSET, at]
    inst.context += offset + inst.clock
    inst.top = max(inst.top, offset)
    inst.next_finish = min(inst.next_finish, run[l, i, FINISH, at])
    world.residue[l, i, (offset - 1) % _setting(world, l, i).block_tokens] += 1


@inlined
def _leave(world, l, i, at):
    """The decoding request at position `at` leaves; the last takes its place."""
    inst = world.instance[l, i]
    run = world.run[l, i]
    offset, finish = run[OFFSET, at], run[FINISH, at]
    inst.context -= offset + inst.clock
    world.residue[l, i, (offset - 1) % _setting(world, l, i).block_tokens] -= 1
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
def _blocks_for_steps(world, l, i, steps):
    """Blocks that the next `steps` decode steps take."""
    inst = world.instance[l, i]
    size = _setting(world, l, i).block_tokens
    residue = world.residue[l, i]
    total = inst.running * (steps // size)
    at = (-inst.clock) % size
    for _ in range(steps % size):
        total += residue[at]
        at = at - 1 if at else size - 1
    return total


@inlined
def _steps_within(world, l, i, blocks, most):
    """How many decode steps, up to `most`, the blocks suffice for."""
    inst = world.instance[l, i]
    size = _setting(world, l, i).block_tokens
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


# --- preemption and finish --------------------------------------------------------------------------------


@inlined
def _give_back(world, l, i, r, tokens):
    """Request r lets all its KV go, of which `tokens` tokens are filled."""
    inst = world.instance[l, i]
    row = world.lane[l].first_row + r
    prefix.publish(world, l, i, r, row, tokens)
    size = _setting(world, l, i).block_tokens
    inst.free += blocks_of(size, tokens) - world.req[l, r].units * inst.unit_blocks
    if inst.unit_blocks:
        prefix.release(world, l, i, r, row)


@inlined
def _worst(world, l, i):
    """Position of the running request to preempt first; NONE stands for the partial prompt."""
    inst = world.instance[l, i]
    by_priority = _setting(world, l, i).by_priority
    worst = NONE
    if inst.part != NONE and not by_priority:
        return worst
    for k in range(inst.running):
        if worst == NONE:
            if inst.part == NONE or waiting.before(world, l, inst.part, world.run[l, i, REQUEST, k]):
                worst = k
        elif by_priority:
            if waiting.before(world, l, world.run[l, i, REQUEST, worst], world.run[l, i, REQUEST, k]):
                worst = k
        elif world.run[l, i, ORDER, worst] < world.run[l, i, ORDER, k]:
            worst = k
    return worst


@kernel
def _preempt(world, l, i, now):
    """Preempt the worst running request by recompute."""
    inst = world.instance[l, i]
    at = _worst(world, l, i)
    if at == NONE:
        r, tokens = inst.part, inst.part_done
        inst.part = NONE
    else:
        r = world.run[l, i, REQUEST, at]
        tokens = world.run[l, i, OFFSET, at] + inst.clock - 1
        row = world.row[world.lane[l].first_row + r]
        world.req[l, r].done = row.output - (world.run[l, i, FINISH, at] - inst.clock)
        world.req[l, r].gap = world.run[l, i, GAP, at]
        world.req[l, r].last = now
        _leave(world, l, i, at)
    _give_back(world, l, i, r, tokens)
    world.req[l, r].lost += tokens
    world.req[l, r].preemptions += 1
    inst.preemptions += 1
    waiting.requeue(world, l, i, r)


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
    _leave(world, l, i, at)
    inst.inflight -= 1
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
        whether anything was preempted, and the partial prompt's chunk in tokens.
    """
    inst = world.instance[l, i]
    setting = _setting(world, l, i)
    preempted = False
    while True:
        need = world.residue[l, i, (-inst.clock) % setting.block_tokens] if inst.running else 0
        chunk = 0
        if inst.part != NONE:
            chunk = min(inst.part_goal - inst.part_done, setting.budget - inst.running)
            need += blocks_of(setting.block_tokens, inst.part_done + chunk)
            need -= blocks_of(setting.block_tokens, inst.part_done)
        if need <= inst.free:
            break
        _preempt(world, l, i, now)
        preempted = True
    inst.free -= need
    return preempted, chunk


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
    run = world.run
    at = inst.running + inst.fresh
    inst.fresh += 1
    # It decodes from the next iteration on, with one token more than it computes now.
    run[l, i, REQUEST, at] = r
    run[l, i, OFFSET, at] = goal - inst.clock
    run[l, i, FINISH, at] = inst.clock + world.row[lane.first_row + r].output - world.req[l, r].done
    run[l, i, GAP, at] = world.req[l, r].gap
    run[l, i, ORDER, at] = world.req[l, r].order


@kernel
def _admit(world, l, i, budget):
    """Admit the head of the waiting list if it fits.

    Returns:
        new tokens it computes in this iteration and their number of past tokens; (0, 0) where it stays.
    """
    inst = world.instance[l, i]
    lane = world.lane[l]
    setting = _setting(world, l, i)
    r = inst.head
    row = lane.first_row + r
    req = world.req[l, r]
    goal = world.row[row].prompt + req.done
    hits, idle = prefix.match(world, l, i, row, goal - 1)
    past = hits * inst.unit_tokens
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
    if req.preemptions == 0:
        req.cached = past
    else:
        req.lost -= past
    req.order = lane.admissions
    lane.admissions += 1
    _compute_prompt(world, l, i, r, past, chunk, goal)
    return chunk, past


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
    """
    inst = world.instance[l, i]
    setting = _setting(world, l, i)
    p = setting.profile
    inst.begin = now
    inst.fresh = 0
    attention = 0
    before = inst.free
    preempted, chunk = _make_room(world, l, i, now)
    if inst.unit_blocks:
        prefix.evict(world, l, i)
    tokens = sequences = inst.running
    longest = chunk
    if chunk:
        attention += prefill_ps(world, p, chunk, inst.part_done)
        tokens += chunk
        sequences += 1
        _compute_prompt(world, l, i, inst.part, inst.part_done, chunk, inst.part_goal)
    while (
        not preempted
        and inst.head != NONE
        and tokens < setting.budget
        and inst.part == NONE
        and sequences + leaving < setting.max_seqs
        and not _unseen(world, l, i, seen)
    ):
        chunk, past = _admit(world, l, i, setting.budget - tokens)
        if chunk == 0:
            break
        attention += prefill_ps(world, p, chunk, past)
        longest = max(longest, chunk)
        tokens += chunk
        sequences += 1
    n = inst.running
    if tokens == 0:
        inst.steps, inst.until = 0, NEVER
    elif (
        tokens == n
        and not preempted
        and not leaving
        and not _unseen(world, l, i, seen)
        and not _may_fit_later(inst, setting)
    ):
        steps = _steps_within(world, l, i, before, inst.next_finish - inst.clock)
        inst.steps = steps
        inst.until = now + stretch_ps(world, p, n, inst.context, inst.top + inst.clock, steps)
    else:
        inst.steps = 1
        top = inst.top + inst.clock
        inst.until = now + iteration_ps(world, p, n, inst.context, top, tokens, sequences, attention, longest)


@inlined
def cut(world, l, i, now):
    """End the stretch in flight at its first boundary at or after now, so that an arrival is scheduled."""
    inst = world.instance[l, i]
    if inst.steps <= 1:
        return
    p = _setting(world, l, i).profile
    top = inst.top + inst.clock
    steps = steps_to_reach(world, p, inst.running, inst.context, top, inst.steps, now - inst.begin)
    if steps < inst.steps:
        inst.steps = steps
        inst.until = inst.begin + stretch_ps(world, p, inst.running, inst.context, top, steps)


@inlined
def _last_step_ps(world, l, i):
    """Duration of the last, longest, iteration of what is in flight."""
    inst = world.instance[l, i]
    if inst.steps == 1:
        return inst.until - inst.begin
    context = inst.context + (inst.steps - 1) * inst.running
    top = inst.top + inst.clock + inst.steps - 1
    return stretch_ps(world, _setting(world, l, i).profile, inst.running, context, top, 1)


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
        _join(world, l, i, at)
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
        _give_back(world, l, i, r, row.prompt + row.output - 1)
        r = world.req[l, r].next


@kernel
def complete(world, l, i):
    """What instance i had in flight ends: tokens stream, requests finish, the next iteration starts."""
    inst = world.instance[l, i]
    now = inst.until
    scrape(world, l, i, now)
    n, steps = inst.running, inst.steps
    gap = _last_step_ps(world, l, i)
    if n:
        gaps = world.run[l, i, GAP]
        for k in range(n):
            gaps[k] = max(gaps[k], gap)
        if steps > 1:
            # The first step's blocks were taken when it was scheduled.
            first = world.residue[l, i, (-inst.clock) % _setting(world, l, i).block_tokens]
            inst.free -= _blocks_for_steps(world, l, i, steps) - first
            if inst.unit_blocks:
                prefix.evict(world, l, i)
        inst.context += n * steps
        inst.streamed_tokens += n * steps
    inst.clock += steps
    if inst.fresh:
        _first_tokens(world, l, i, now)
    finished, first = _finish_due(world, l, i, now)
    inst.until = NEVER
    if _setting(world, l, i).asynchronous:
        schedule(world, l, i, now, now - gap, finished)
    _drop_finished(world, l, i, first)
    if inst.until == NEVER:
        schedule(world, l, i, now, now, 0)
