"""Live migration between instances, as in Llumnix (OSDI'24): staged copies while the request decodes.

A stage copies the full blocks written since the one before. When at most `last_blocks` are left, the request
stops at its instance's next boundary, the rest is copied, and it joins the batch of the destination, which
has reserved memory stage by stage. A migration is given up when the request finishes or is preempted, when
the destination lacks memory, or after `stages` live copies; the request then goes on where it is. A waiting
request has no KV and moves at once.

An instance takes part in one migration at a time. Its copies share one link with its swaps, one after the
other, and iterations beside a copy take longer.
"""

from __future__ import annotations

from servegym.envs.cluster import prefix, waiting
from servegym.envs.cluster.kernel import inlined, kernel
from servegym.envs.cluster.memory import blocks_of, book_steps, fits, give_back, setting_of
from servegym.envs.cluster.running import cut, kick, leave, position, tokens_computed
from servegym.envs.cluster.scrape import scrape
from servegym.envs.cluster.state import FINISH, GAP, LAST, LIVE, NEVER, NONE, ORDER, REQUEST, STOPPING

# --- who may move -----------------------------------------------------------------------------------------


@inlined
def is_engaged(inst):
    """Whether the instance is the source or the destination of a migration in flight."""
    return inst.out != NONE or inst.inbound != NONE


@kernel
def bring_up(world, l, i):
    """Make the books of instance i exact at lane.now: its scrape, its steps in flight and their blocks."""
    now = world.lane[l].now
    scrape(world, l, i, now)
    cut(world, l, i, now)
    book_steps(world, l, i)


@kernel
def can_move(world, l, s, d, r):
    """Whether request r may leave instance s for d now: waiting without KV on the host, or decoding.

    The books of both instances are exact, as `bring_up` makes them.
    """
    if world.req[l, r].instance != s:
        return False
    at = position(world, l, s, r)
    if at != NONE:
        return may_join(world, l, s, d) and has_room(world, l, s, d, at)
    return waiting.holds(world, l, s, r) and can_move_waiting(world, l, s, d, r)


@kernel
def can_move_waiting(world, l, s, d, r):
    """Whether request r, which waits on instance s, may leave for d."""
    return s != d and world.req[l, r].hosted == 0 and fits(world, l, d, r)


@kernel
def may_join(world, l, s, d):
    """Whether instance d may take a request that decodes on s: neither migrates, and a sequence is free."""
    source, target = world.instance[l, s], world.instance[l, d]
    if s == d or is_engaged(source) or is_engaged(target) or target.joiner != NONE:
        return False
    return target.running + target.fresh + (target.part != NONE) < setting_of(world, l, d).max_seqs


@kernel
def has_room(world, l, s, d, at):
    """Whether instance d has memory for the request at position `at` of instance s."""
    target, setting = world.instance[l, d], setting_of(world, l, d)
    tokens = _full_blocks(world, l, s, at) * setting_of(world, l, s).block_tokens
    needed = blocks_of(setting.block_tokens, tokens)
    return needed <= target.free - setting.watermark and fits(world, l, d, world.run[l, s, REQUEST, at])


@kernel
def freeness(world, l, i):
    """Llumnix's freeness: free KV tokens less the demand of those that wait, by the batch's size."""
    inst = world.instance[l, i]
    setting = setting_of(world, l, i)
    tokens = inst.free * setting.block_tokens
    r = inst.head
    while r != NONE:
        tokens -= world.row[world.lane[l].first_row + r].prompt + world.req[l, r].done
        r = world.req[l, r].next
    return tokens / max(inst.running + inst.fresh + (inst.part != NONE) + (inst.waiting > 0), 1)


@kernel
def default_mover(world, l, i):
    """The request that leaves instance i unless somebody says otherwise.

    The least urgent that decodes, of these the last admitted; where nothing decodes the tail of the waiting
    list; NONE on an empty instance.
    """
    inst = world.instance[l, i]
    first_row = world.lane[l].first_row
    best = NONE
    for k in range(inst.running):
        if best == NONE:
            best = k
            continue
        level = world.row[first_row + world.run[l, i, REQUEST, k]].priority
        lowest = world.row[first_row + world.run[l, i, REQUEST, best]].priority
        later = world.run[l, i, ORDER, k] > world.run[l, i, ORDER, best]
        if level > lowest or (level == lowest and later):
            best = k
    return inst.tail if best == NONE else world.run[l, i, REQUEST, best]


# --- moving -----------------------------------------------------------------------------------------------


@kernel
def move(world, l, s, d, r):
    """Request r leaves instance s for d; `can_move` holds."""
    now = world.lane[l].now
    bring_up(world, l, s)
    bring_up(world, l, d)
    at = position(world, l, s, r)
    if at == NONE:
        waiting.remove(world, l, s, r)
        _hand_over(world, l, s, d, r)
        waiting.enqueue(world, l, d, r)
        kick(world, l, s, now)
        kick(world, l, d, now)
        return
    source, target = world.instance[l, s], world.instance[l, d]
    source.out, source.out_to, source.out_phase, source.out_stage = r, d, LIVE, 1
    source.out_copied = source.out_reserved = 0
    target.inbound = s
    world.lane[l].moving += 1
    blocks = _full_blocks(world, l, s, at)
    _reserve(world, l, s, d, blocks * setting_of(world, l, s).block_tokens)
    _copy(world, l, s, blocks, now)


@inlined
def _full_blocks(world, l, s, at):
    """Blocks of instance s that the decoding request at position `at` has filled."""
    return tokens_computed(world, l, s, at) // setting_of(world, l, s).block_tokens


@inlined
def _reserve(world, l, s, d, tokens):
    """Take memory on d for `tokens` tokens in all of what leaves s.

    Returns:
        whether it was there; the first time nobody asks, since `can_move` has.
    """
    source, target = world.instance[l, s], world.instance[l, d]
    setting = setting_of(world, l, d)
    extra = blocks_of(setting.block_tokens, tokens) - source.out_reserved
    if extra > target.free - setting.watermark:
        return False
    source.out_reserved += extra
    target.free -= extra
    if target.unit_blocks:
        prefix.evict(world, l, d)
    source.out_copied = tokens
    return True


@inlined
def _copy(world, l, s, blocks, now):
    """Start to copy so many blocks from s as soon as both links are free."""
    source = world.instance[l, s]
    target = world.instance[l, source.out_to]
    setting = setting_of(world, l, s)
    start = max(now, max(source.link_until, target.link_until))
    source.out_until = start + setting.net_call + setting.net_block * blocks
    source.link_until = target.link_until = source.out_until


@kernel
def copy_ended(world, l, s):
    """A copy from instance s has ended at lane.now."""
    source = world.instance[l, s]
    now = world.lane[l].now
    scrape(world, l, s, now)
    scrape(world, l, source.out_to, now)
    if source.out_phase == LAST:
        _commit(world, l, s, now)
        return
    setting = setting_of(world, l, s)
    at = position(world, l, s, source.out)
    tokens = tokens_computed(world, l, s, at)
    copied = source.out_copied // setting.block_tokens
    left = blocks_of(setting.block_tokens, tokens) - copied
    if left <= world.episode[world.lane[l].episode].last_blocks:
        source.out_phase, source.out_until = STOPPING, NEVER
        return
    full = tokens // setting.block_tokens
    if source.out_stage == world.episode[world.lane[l].episode].stages or not _reserve(
        world, l, s, source.out_to, full * setting.block_tokens
    ):
        abort(world, l, s, now)
        return
    source.out_stage += 1
    _copy(world, l, s, full - copied, now)


@kernel
def stop(world, l, s, now):
    """At a boundary of instance s its stopping request leaves the batch for the last copy."""
    source = world.instance[l, s]
    scrape(world, l, source.out_to, now)
    setting = setting_of(world, l, s)
    r = source.out
    at = position(world, l, s, r)
    tokens = tokens_computed(world, l, s, at)
    copied = source.out_copied // setting.block_tokens
    if not _reserve(world, l, s, source.out_to, tokens):
        abort(world, l, s, now)
        return
    save_progress(world, l, s, at, now)
    leave(world, l, s, at)
    source.out_phase = LAST
    _copy(world, l, s, blocks_of(setting.block_tokens, tokens) - copied, now)


@inlined
def save_progress(world, l, i, at, now):
    """Keep with the request at position `at` what the run arrays know of it, before it leaves them."""
    inst = world.instance[l, i]
    r = world.run[l, i, REQUEST, at]
    req = world.req[l, r]
    req.done = world.row[world.lane[l].first_row + r].output - (world.run[l, i, FINISH, at] - inst.clock)
    req.gap = world.run[l, i, GAP, at]
    req.last = now


@kernel
def _commit(world, l, s, now):
    """The last copy from instance s has ended: the request belongs to the destination."""
    source = world.instance[l, s]
    d, r = source.out_to, source.out
    target = world.instance[l, d]
    target.joiner, target.joiner_kv, target.joiner_blocks = r, source.out_copied, source.out_reserved
    give_back(world, l, s, r, source.out_copied)
    _disengage(world, l, s)
    _hand_over(world, l, s, d, r)
    kick(world, l, s, now)
    kick(world, l, d, now)


@kernel
def abort(world, l, s, now):
    """The migration from instance s is given up; its request goes on there if it still runs."""
    source = world.instance[l, s]
    d = source.out_to
    scrape(world, l, d, now)
    world.instance[l, d].free += source.out_reserved
    _disengage(world, l, s)
    kick(world, l, d, now)


@inlined
def _disengage(world, l, s):
    source = world.instance[l, s]
    world.instance[l, source.out_to].inbound = NONE
    source.out, source.out_until = NONE, NEVER
    world.lane[l].moving -= 1


@kernel
def _hand_over(world, l, s, d, r):
    """The router books request r with instance d instead of s."""
    lane = world.lane[l]
    source, target = world.instance[l, s], world.instance[l, d]
    row, req = world.row[lane.first_row + r], world.req[l, r]
    req.instance = d
    req.migrations += 1
    source.inflight -= 1
    target.inflight += 1
    source.prompt_tokens -= row.prompt
    target.prompt_tokens += row.prompt
    source.predicted_tokens -= row.predicted
    target.predicted_tokens += row.predicted
    source.streamed_tokens -= req.done
    target.streamed_tokens += req.done
    if row.priority < lane.least_urgent:
        source.urgent -= 1
        target.urgent += 1
    if req.first == NEVER:
        source.prefill_tokens -= req.booked
        hit = prefix.match(world, l, d, lane.first_row + r, row.prompt - 1)[0] * target.unit_tokens
        req.booked = row.prompt - hit
        target.prefill_tokens += req.booked
