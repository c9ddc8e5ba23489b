"""The observation of each kind of question, and what its answers would do.

Requests, instances and globals are written alike for all kinds; the edges say what an answer would do:

    preempt   prefill_s     the iterations that recompute the request's KV alone
              copy_s        its KV to the host and back
              step_after_s  a decode-only iteration of the others, equally long
              kv_after      fraction of the blocks that are held after it gave way
    migrate   as a dispatch to the destination, of the prompt and what was streamed since; a waiting request
    and move  computes its uncached prompt there (prefill_s), KV is copied as a whole (copy_s)
    budget    iteration_s   an iteration of the decodes and a chunk as large as the cap and the budget allow
              queue_s       such iterations until all prompts here are computed

Everything is known where the decision is taken: within an engine its own scheduler's state, elsewhere the
router's book-keeping. `oracle` is the output truly to come of the request that would give way or move.
"""

from __future__ import annotations

import numpy as np

from servegym.envs.cluster import prefix
from servegym.envs.cluster.kernel import inlined, kernel
from servegym.envs.cluster.memory import blocks_of, setting_of
from servegym.envs.cluster.observe import (
    COPY,
    DECODE_STEP,
    IS_DEFAULT,
    ITERATION,
    KV_AFTER,
    KV_TOKENS,
    KV_USAGE,
    LEFT,
    PREEMPTED,
    PREFILL,
    PREFILL_CAP,
    PREFIX_HIT,
    QUEUE,
    RUNS,
    SECOND,
    SESSION_LAST,
    SOURCE_QUEUE,
    SOURCE_STEP,
    SOURCE_USAGE,
    STEP_AFTER,
    STREAMED,
    SWAP,
    blank,
    books,
    observe_dispatch,
    observe_instances,
    prefill_s,
    set_default,
    step_s,
    write_request,
)
from servegym.envs.cluster.offers import (
    DESTINATIONS,
    SOURCES,
    is_legal_pair,
    offer_victims,
    progress,
    source_of,
)
from servegym.envs.cluster.preemption import can_swap, default_victim, swap_ps
from servegym.envs.cluster.scrape import steps_done
from servegym.envs.cluster.state import DISPATCH, MIGRATE, MOVE, NONE, PREEMPT
from servegym.envs.costs.model import iteration_ps, prefill_ps

CAPS = 5  # offered caps: the token budget, halved from one to the next
LEAST_CAP = 16


@inlined
def observe(world, frame, l):
    """Write the observation of lane l's open question; call it once per question.

    What may move where has been offered; victims are offered here.
    """
    lane = world.lane[l]
    if lane.question == DISPATCH:
        observe_dispatch(world, frame, l)
        return
    blank(frame, l, lane.question)
    observe_instances(world, frame, l)
    if lane.question == PREEMPT:
        _observe_preempt(world, frame, l)
    elif lane.question == MIGRATE:
        _observe_migrate(world, frame, l)
    elif lane.question == MOVE:
        _observe_move(world, frame, l)
    else:
        _observe_budget(world, frame, l)


@kernel
def _request(world, frame, l, k, r):
    """Write row k: request r, and how it fares where it is."""
    write_request(world, frame, l, k, r)
    i = np.int64(world.req[l, r].instance)
    streamed, tokens, runs = progress(world, l, i, r)
    node = frame.requests[l, k]
    node[STREAMED] = streamed
    node[LEFT] = max(world.row[world.lane[l].first_row + r].predicted - streamed, 0)
    node[KV_TOKENS] = tokens
    node[RUNS] = runs
    node[PREEMPTED] = world.req[l, r].preemptions
    node[SOURCE_USAGE] = frame.instances[l, i, KV_USAGE]
    node[SOURCE_STEP] = frame.instances[l, i, DECODE_STEP]
    node[SOURCE_QUEUE] = world.instance[l, i].prefill_tokens / setting_of(world, l, i).prefill_tokens_per_s


@kernel
def _candidate(frame, l, c, k, i, source):
    """Answer c is legal: it is about request row k, instance i and, where it moves, its source."""
    frame.candidates[l, c, 0] = k
    frame.candidates[l, c, 1] = i
    frame.candidates[l, c, 2] = source
    frame.mask[l, c] = 1


@kernel
def _truth(world, frame, l, c, r):
    """The oracle of an answer about request r: output tokens to come."""
    if frame.oracle.shape[1]:
        streamed = progress(world, l, np.int64(world.req[l, r].instance), r)[0]
        frame.oracle[l, c] = world.row[world.lane[l].first_row + r].output - streamed


# --- preemption -------------------------------------------------------------------------------------------


@kernel
def _observe_preempt(world, frame, l):
    i = world.lane[l].asker
    victim = default_victim(world, l, i)
    default = 0
    for k in range(offer_victims(world, l, i)):
        r = np.int64(world.offer[l, k])
        _request(world, frame, l, k, r)
        tokens = progress(world, l, i, r)[1]
        _victim(world, frame, l, 1 + 2 * k, k, r, 0)
        swaps = can_swap(world, l, i, tokens)
        if swaps:
            _victim(world, frame, l, 2 + 2 * k, k, r, 1)
        if r == victim:
            default = 2 + 2 * k if swaps and setting_of(world, l, i).by_swap else 1 + 2 * k
    set_default(frame, l, default)


@kernel
def _victim(world, frame, l, c, k, r, by_swap):
    """Write answer c: request r in row k gives way to the others on its instance."""
    i = world.lane[l].asker
    inst = world.instance[l, i]
    setting = setting_of(world, l, i)
    tokens = progress(world, l, i, r)[1]
    blocks = blocks_of(setting.block_tokens, tokens)
    _candidate(frame, l, c, k, i, NONE)
    _truth(world, frame, l, c, r)
    edge = frame.edges[l, c]
    edge[SWAP] = by_swap
    if by_swap:
        edge[COPY] = 2 * swap_ps(setting, blocks) * SECOND
    elif tokens:
        edge[PREFILL] = prefill_s(world, setting.profile, tokens, 0, inst.cap)
    n, context = inst.running, inst.context
    if r != inst.part:
        n, context = n - 1, context - (tokens + 1)
    edge[STEP_AFTER] = step_s(world, setting.profile, n, context, 0)[0]
    held = setting.blocks - inst.free - blocks + _shared_blocks(world, l, i, r)
    edge[KV_AFTER] = held / setting.blocks


@kernel
def _shared_blocks(world, l, i, r):
    """Blocks of request r's prefix that other requests hold, too."""
    first = world.row[world.lane[l].first_row + r].prefix
    shared = 0
    for k in range(world.req[l, r].units):
        unit = prefix.find(world, l, i, world.prefix[first + k])
        shared += world.unit[l, i, unit].holders > 1
    return shared * world.instance[l, i].unit_blocks


# --- migration --------------------------------------------------------------------------------------------


@kernel
def _observe_migrate(world, frame, l):
    for a in range(SOURCES):
        r = np.int64(world.offer[l, a])
        if r == NONE:
            break
        s = source_of(world, l, a)
        _request(world, frame, l, a, r)
        for b in range(DESTINATIONS):
            d = np.int64(world.receiver[l, b])
            if d != NONE and is_legal_pair(world, l, s, d):
                _move(world, frame, l, 1 + DESTINATIONS * a + b, a, r, s, d)
    frame.edges[l, 0, IS_DEFAULT] = 1.0
    frame.candidates[l, 0, 1] = source_of(world, l, 0)


@kernel
def _observe_move(world, frame, l):
    s, d = world.lane[l].asker, world.lane[l].target
    for k in range(world.offer.shape[1]):
        r = np.int64(world.offer[l, k])
        if r == NONE:
            break
        _request(world, frame, l, k, r)
        _move(world, frame, l, 1 + k, k, r, s, d)
    set_default(frame, l, 1)


@kernel
def _move(world, frame, l, c, k, r, s, d):
    """Write answer c: request r in row k moves from instance s to d."""
    lane = world.lane[l]
    inst = world.instance[l, d]
    setting = setting_of(world, l, d)
    row = world.row[lane.first_row + r]
    _candidate(frame, l, c, k, d, s)
    _truth(world, frame, l, c, r)
    streamed, tokens, runs = progress(world, l, s, r)
    goal = row.prompt + streamed
    hit = prefix.match(world, l, d, lane.first_row + r, goal - 1)[0] * inst.unit_tokens
    edge = frame.edges[l, c]
    edge[PREFIX_HIT] = hit
    edge[QUEUE] = inst.prefill_tokens / setting.prefill_tokens_per_s
    if runs:
        here = setting_of(world, l, s)
        edge[COPY] = (here.net_call + here.net_block * blocks_of(here.block_tokens, tokens)) * SECOND
    else:
        edge[PREFILL] = prefill_s(world, setting.profile, goal - hit, hit, inst.cap)
    n, context, to_come = books(world, l, d)
    capacity = setting.blocks * setting.block_tokens
    n_after, kv = min(n + 1, setting.max_seqs), min(context + goal, capacity)
    edge[STEP_AFTER] = step_s(world, setting.profile, n_after, kv, 0)[0]
    edge[KV_AFTER] = (context + to_come + goal + max(row.predicted - streamed, 0)) / capacity
    if row.previous_turn != NONE:
        edge[SESSION_LAST] = world.req[l, row.previous_turn].instance == d


# --- prefill budget ---------------------------------------------------------------------------------------


@kernel
def _observe_budget(world, frame, l):
    i = world.lane[l].asker
    inst = world.instance[l, i]
    setting = setting_of(world, l, i)
    r = inst.head if inst.part == NONE else inst.part
    _request(world, frame, l, 0, r)
    past = progress(world, l, i, r)[1]
    tokens = _prompt_tokens(world, l, i)
    _cap(world, frame, l, 0, inst.cap, past, tokens)
    frame.edges[l, 0, IS_DEFAULT] = 1.0
    for k in range(CAPS):
        cap = min(max(setting.budget >> k, LEAST_CAP), setting.budget)
        _cap(world, frame, l, 1 + k, cap, past, tokens)


@kernel
def _cap(world, frame, l, c, cap, past, tokens):
    """Write answer c: iterations compute `cap` each of `tokens` prompt tokens, the first behind `past`."""
    i = world.lane[l].asker
    inst = world.instance[l, i]
    setting = setting_of(world, l, i)
    p, n = setting.profile, inst.running
    context = inst.context + steps_done(inst, world.lane[l].now) * n
    chunk = min(cap, setting.budget - n)
    attention = prefill_ps(world.tables, p, chunk, past)
    top, sequences = context // max(n, 1), min(n + 1, setting.max_seqs)
    ps = iteration_ps(world.tables, p, n, context, top, n + chunk, sequences, attention, chunk)
    iteration = ps * SECOND
    _candidate(frame, l, c, 0, i, NONE)
    edge = frame.edges[l, c]
    edge[PREFILL_CAP] = cap
    edge[ITERATION] = iteration
    edge[QUEUE] = iteration * ((tokens + max(chunk, 1) - 1) // max(chunk, 1))


@kernel
def _prompt_tokens(world, l, i):
    """Tokens to prefill on instance i: prompts less what was cached at dispatch, and what was preempted."""
    inst = world.instance[l, i]
    tokens = inst.part_goal - inst.part_done if inst.part != NONE else 0
    r = inst.head
    while r != NONE:
        req = world.req[l, r]
        if req.preemptions == 0:
            tokens += req.booked
        else:
            tokens += world.row[world.lane[l].first_row + r].prompt + req.done - req.hosted
        r = req.next
    return tokens
