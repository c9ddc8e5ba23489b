"""The observation of a lane, written into the caller's buffers by numba kernels without allocation.

What a deployment cannot know is not read here, but by `_oracle`. The router's estimates are

    inflight_context_tokens   prompts in flight + tokens streamed by requests in flight
    inflight_predicted_tokens predictions in flight - streamed tokens, at least 0
    decode_step_s             a decode-only iteration of min(in flight, max_seqs) requests with
                              min(inflight_context_tokens, capacity) tokens of KV, all equally long
    queue_s                   inflight_prefill_tokens / prefill_tokens_per_s
    prefill_s                 the iterations, of prefill_budget tokens, that compute the uncached prompt alone
    step_after_s              decode_step_s with one request and its prompt more
    kv_after                  (context + predicted, in flight and of this request) / capacity

An exponential mean over T seconds of arrivals at times a is sum(exp(-(now - a) / T)) / T.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from servegym.envs.cluster import prefix, schema
from servegym.envs.cluster.address import by_address
from servegym.envs.cluster.kernel import inlined, kernel
from servegym.envs.cluster.lane import RATE_MEMORY_S, default_instance
from servegym.envs.cluster.memory import fits
from servegym.envs.cluster.migration import is_engaged
from servegym.envs.cluster.scrape import look, steps_done
from servegym.envs.cluster.state import DISPATCH, FINISH, NONE, PS
from servegym.envs.costs.model import prefill_ps

(
    RUNNING, WAITING, KV_USAGE, PREEMPTIONS, SCRAPE_AGE, INFLIGHT, PREFILL_TOKENS, CONTEXT_TOKENS,
    PREDICTED_TOKENS, KV_CAPACITY, TOKEN_BUDGET, MAX_SEQS, PREFILL_SPEED, DECODE_SPEED, DECODE_STEP,
    AVAILABLE, PREFILL_BUDGET, URGENT, HOST_USAGE, ENGAGED,
) = range(len(schema.INSTANCE))  # fmt: skip
(
    IS_DEFAULT, PREFIX_HIT, QUEUE, PREFILL, STEP_AFTER, KV_AFTER, SESSION_LAST, SWAP, COPY, PREFILL_CAP,
    ITERATION,
) = range(len(schema.EDGE))  # fmt: skip
(
    PROMPT, PREDICTED, PRIORITY, SLO_TTFT, SLO_TPOT, WEIGHT, WAITED, TURN, STREAMED, LEFT, KV_TOKENS, RUNS,
    PREEMPTED, SOURCE_USAGE, SOURCE_STEP, SOURCE_QUEUE,
) = range(len(schema.REQUEST))  # fmt: skip
INSTANCES, ARRIVAL_RATE, ARRIVAL_TOKENS, SINCE_LAST, ALL_INFLIGHT = range(len(schema.GLOBAL))
SECOND = 1.0 / PS


@by_address
class Frame(NamedTuple):
    """Observations of L lanes: the arrays of `schema` with a leading lane dimension.

    `oracle` is float64 [L, C], what each answer truly costs, or [L, 0] where nobody asked: seconds of work
    left on the instance for a dispatch, output tokens to come for a request that may give way or move.
    """

    instances: np.ndarray
    requests: np.ndarray
    candidates: np.ndarray
    edges: np.ndarray
    globals: np.ndarray
    history: np.ndarray
    instance_mask: np.ndarray
    mask: np.ndarray
    kind: np.ndarray
    oracle: np.ndarray


def make_frame(lanes: int, instances: int, requests: int = 1, *, oracle: bool = False) -> Frame:
    """Zeroed buffers for fleets of up to `instances` and questions about up to `requests` requests."""
    most = schema.most_candidates(instances, requests)
    candidates = np.zeros((lanes, most, 3), np.int32)
    candidates[:, 1 : instances + 1, 1] = np.arange(instances)
    candidates[:, :, 2] = -1
    return Frame(
        instances=np.zeros((lanes, instances, len(schema.INSTANCE)), np.float32),
        requests=np.zeros((lanes, requests, len(schema.REQUEST)), np.float32),
        candidates=candidates,
        edges=np.zeros((lanes, most, len(schema.EDGE)), np.float32),
        globals=np.zeros((lanes, len(schema.GLOBAL)), np.float32),
        history=np.zeros((lanes, schema.HISTORY), np.float32),
        instance_mask=np.zeros((lanes, instances), np.int8),
        mask=np.zeros((lanes, most), np.int8),
        kind=np.zeros(lanes, np.int64),
        oracle=np.zeros((lanes, most if oracle else 0), np.float64),
    )


@inlined
def _copy(source, target):
    for k in range(len(source)):
        target[k] = source[k]


@inlined
def _copy_rows(source, target):
    for k in range(len(source)):
        _copy(source[k], target[k])


@inlined
def copy_frame(source, l, target, place):
    """Copy the observation in row l of a frame to a row of another one."""
    _copy_rows(source.instances[l], target.instances[place])
    _copy_rows(source.requests[l], target.requests[place])
    _copy_rows(source.candidates[l], target.candidates[place])
    _copy_rows(source.edges[l], target.edges[place])
    _copy(source.globals[l], target.globals[place])
    _copy(source.history[l], target.history[place])
    _copy(source.instance_mask[l], target.instance_mask[place])
    _copy(source.mask[l], target.mask[place])
    target.kind[place] = source.kind[l]
    _copy(source.oracle[l], target.oracle[place])


@kernel
def start_frame(world, frame, l):
    """Write what stays the same for the whole episode; call it after the lane's restart."""
    frame.instances[l] = 0.0
    frame.instance_mask[l] = 0
    blank(frame, l, np.int64(DISPATCH))
    lane = world.lane[l]
    for i in range(lane.instances):
        setting = world.setting[lane.fleet, i]
        node = frame.instances[l, i]
        node[KV_CAPACITY] = setting.blocks * setting.block_tokens
        node[TOKEN_BUDGET] = setting.budget
        node[MAX_SEQS] = setting.max_seqs
        node[PREFILL_SPEED] = setting.prefill_tokens_per_s
        node[DECODE_SPEED] = setting.decode_tokens_per_s
        frame.instance_mask[l, i] = 1


@kernel
def blank(frame, l, kind):
    """A question without requests: candidate 0 is the only answer; the others stand as for a dispatch."""
    frame.kind[l] = kind
    frame.requests[l] = 0.0
    frame.edges[l] = 0.0
    frame.oracle[l] = 0.0
    frame.mask[l] = 0
    frame.mask[l, 0] = 1
    frame.candidates[l, :, 0] = 0
    frame.candidates[l, :, 1] = 0
    frame.candidates[l, :, 2] = -1
    for i in range(frame.instances.shape[1]):
        frame.candidates[l, i + 1, 1] = i


@kernel
def observe_end(world, frame, l):
    """The observation after the last request: the same instances, idle, and nothing to decide."""
    blank(frame, l, np.int64(DISPATCH))
    observe_instances(world, frame, l)


@kernel
def observe_instances(world, frame, l):
    """Write the instances, globals and history of a question other than dispatch."""
    lane = world.lane[l]
    _arrivals(world, frame, l, NONE)
    inflight, j = 0, 0
    for i in range(lane.instances):
        look(world, l, i, lane.now)
        n, _, _, j = _node(world, frame, l, i, j)
        inflight += n
    frame.globals[l, ALL_INFLIGHT] = inflight


@inlined
def observe_dispatch(world, frame, l):
    """The observation of the pending request's dispatch; call it once per decision, when it has arrived."""
    lane = world.lane[l]
    r = lane.pending
    row = world.row[lane.first_row + r]
    lane.default = default_instance(world, l)
    if frame.kind[l] != DISPATCH:
        blank(frame, l, np.int64(DISPATCH))
    _arrivals(world, frame, l, r)
    write_request(world, frame, l, 0, r)
    frame.requests[l, 0, LEFT] = row.predicted
    last = world.req[l, row.previous_turn].instance if row.previous_turn != NONE else NONE
    inflight, j = 0, 0
    p, budget, uncached, prefill = NONE, NONE, NONE, 0.0
    for i in range(lane.instances):
        look(world, l, i, lane.now)
        n, context, to_come, j = _node(world, frame, l, i, j)
        inflight += n
        inst = world.instance[l, i]
        setting = world.setting[lane.fleet, i]
        hit = 0
        if row.prefixes and inst.unit_blocks:
            hit = prefix.match(world, l, i, lane.first_row + r, row.prompt - 1)[0] * inst.unit_tokens
        # Replicas of one kind cost the same, so the last result is often the one that is needed.
        if setting.profile != p or inst.cap != budget or row.prompt - hit != uncached:
            p, budget, uncached = setting.profile, inst.cap, row.prompt - hit
            prefill = prefill_s(world, p, uncached, hit, budget)
        capacity = setting.blocks * setting.block_tokens
        n_after = min(n + 1, setting.max_seqs)
        edge = frame.edges[l, i + 1]
        edge[PREFIX_HIT] = hit
        edge[QUEUE] = inst.prefill_tokens / setting.prefill_tokens_per_s
        edge[PREFILL] = prefill
        edge[STEP_AFTER], j = step_s(world, p, n_after, min(context + row.prompt, capacity), j)
        edge[KV_AFTER] = (context + to_come + row.prompt + row.predicted) / capacity
        edge[SESSION_LAST] = i == last
        frame.mask[l, i + 1] = fits(world, l, i, r)
        if frame.oracle.shape[1]:
            frame.oracle[l, i + 1] = _oracle(world, l, i)
    frame.globals[l, ALL_INFLIGHT] = inflight
    set_default(frame, l, lane.default + 1)


@inlined
def set_default(frame, l, c):
    """Make candidate 0 stand for what candidate c does."""
    _copy(frame.candidates[l, c], frame.candidates[l, 0])
    _copy(frame.edges[l, c], frame.edges[l, 0])
    frame.edges[l, 0, IS_DEFAULT] = 1.0
    if frame.oracle.shape[1]:
        frame.oracle[l, 0] = frame.oracle[l, c]


@inlined
def books(world, l, i):
    """The router's book of instance i: requests, context tokens and predicted tokens in flight."""
    inst = world.instance[l, i]
    streamed = inst.streamed_tokens + steps_done(inst, world.lane[l].now) * inst.running
    return inst.inflight, inst.prompt_tokens + streamed, max(0, inst.predicted_tokens - streamed)


@inlined
def _node(world, frame, l, i, j):
    """Write an instance's changing features.

    Returns:
        requests, context tokens and predicted tokens in flight there, and the segment of `step_s`.
    """
    lane = world.lane[l]
    inst = world.instance[l, i]
    setting = world.setting[lane.fleet, i]
    n, context, to_come = books(world, l, i)
    capacity = setting.blocks * setting.block_tokens
    node = frame.instances[l, i]
    node[RUNNING] = inst.seen_running
    node[WAITING] = inst.seen_waiting
    node[KV_USAGE] = inst.seen_usage
    node[PREEMPTIONS] = inst.seen_rise
    node[SCRAPE_AGE] = (lane.now - inst.scraped_at) * SECOND
    node[INFLIGHT] = n
    node[PREFILL_TOKENS] = inst.prefill_tokens
    node[CONTEXT_TOKENS] = context
    node[PREDICTED_TOKENS] = to_come
    n_run, kv = min(n, setting.max_seqs), min(context, capacity)
    node[DECODE_STEP], j = step_s(world, setting.profile, n_run, kv, j)
    node[AVAILABLE] = lane.now < setting.drain
    node[PREFILL_BUDGET] = inst.cap
    node[URGENT] = inst.urgent
    if setting.host_blocks:
        node[HOST_USAGE] = (setting.host_blocks - inst.host_free) / setting.host_blocks
    node[ENGAGED] = is_engaged(inst)
    return n, context, to_come, j


@inlined
def write_request(world, frame, l, k, r):
    """Write into row k what is known of request r since it arrived."""
    lane = world.lane[l]
    row = world.row[lane.first_row + r]
    node = frame.requests[l, k]
    node[PROMPT] = row.prompt
    node[PREDICTED] = row.predicted
    node[PRIORITY] = row.priority
    node[SLO_TTFT] = row.slo_ttft
    node[SLO_TPOT] = row.slo_tpot
    node[WEIGHT] = row.weight
    node[WAITED] = (lane.now - world.req[l, r].arrived) * SECOND
    node[TURN] = row.turn


@inlined
def _arrivals(world, frame, l, r):
    """Bring the router's arrival statistics up to now, count request r unless NONE, and write them."""
    lane = world.lane[l]
    since = (lane.now - lane.last_arrival) * SECOND
    decay = math.exp(-since / RATE_MEMORY_S)
    rate, tokens = lane.arrival_rate * decay, lane.prompt_rate * decay
    second = lane.now // PS
    for passed in range(max(lane.history_second + 1, second - schema.HISTORY + 1), second + 1):
        world.history[l, passed % schema.HISTORY] = 0.0
    lane.history_second = second
    if r != NONE:
        rate += 1.0 / RATE_MEMORY_S
        tokens += world.row[lane.first_row + r].prompt / RATE_MEMORY_S
        lane.arrival_rate, lane.prompt_rate, lane.last_arrival = rate, tokens, lane.now
        world.history[l, second % schema.HISTORY] += 1.0
    for k in range(schema.HISTORY):
        frame.history[l, k] = world.history[l, (second + 1 + k) % schema.HISTORY]
    frame.globals[l, INSTANCES] = lane.instances
    frame.globals[l, ARRIVAL_RATE] = rate
    frame.globals[l, ARRIVAL_TOKENS] = tokens
    frame.globals[l, SINCE_LAST] = since


@inlined
def step_s(world, p, n, context, j):
    """A decode-only iteration of n requests, equally long, with `context` tokens of KV in all.

    As `costs.model.iteration_ps`, but the search for the segment of the mean context starts at segment j:
    from one instance to the next it hardly moves, where a bisection would be mispredicted.

    Returns:
        seconds, 0 for n = 0, and the segment.
    """
    if n == 0:
        return 0.0, j
    knot = world.tables.decode_knot
    while j < knot.shape[1] - 1 and n * knot[p, j + 1] <= context:
        j += 1
    while n * knot[p, j] > context:
        j -= 1
    return world.glance[p, n, j, 0] + world.glance[p, n, j, 1] * (context - n * knot[p, j]), j


@kernel
def prefill_s(world, p, uncached, past, budget):
    """Seconds of the iterations that compute `uncached` prompt tokens behind `past` cached ones, alone.

    Attention grows linearly with the past, so all full chunks together cost as many at their mean past.
    """
    tables = world.tables
    each = tables.head[p, 1] + tables.chunked[p]
    full = (uncached - 1) // budget
    rest = uncached - full * budget
    ps = each + tables.linear[p, rest] + prefill_ps(tables, p, rest, past + full * budget)
    if full:
        attention = prefill_ps(tables, p, budget, past + (full - 1) * budget // 2)
        ps += full * (each + tables.linear[p, budget] + attention)
    return ps * SECOND


@kernel
def _oracle(world, l, i):
    """Seconds of work truly left on an instance: what no deployment knows.

    prompt tokens to compute / prefill_tokens_per_s + output tokens to come / decode_tokens_per_s
    """
    lane = world.lane[l]
    inst = world.instance[l, i]
    setting = world.setting[lane.fleet, i]
    if inst.inflight == 0:
        return 0.0
    prompt, output = 0, 0
    for k in range(inst.running + inst.fresh):
        output += world.run[l, i, FINISH, k] - inst.clock
    output -= steps_done(inst, lane.now) * inst.running
    if inst.part != NONE:
        prompt += inst.part_goal - inst.part_done
        output += world.row[lane.first_row + inst.part].output - world.req[l, inst.part].done
    r = inst.head
    while r != NONE:
        row = world.row[lane.first_row + r]
        prompt += row.prompt + world.req[l, r].done
        output += row.output - world.req[l, r].done
        r = world.req[l, r].next
    return prompt / setting.prefill_tokens_per_s + output / setting.decode_tokens_per_s
