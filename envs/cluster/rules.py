"""Rules that answer questions inside the model; each reads one lane's row of the frame, as a policy would.

`servegym.agents.heuristics` wraps them as policies and says where each was published. A rule scores the legal
candidates beyond the default and answers the least, the first of equals, or 0 where it wants none:

    dispatch  least_request   inflight
              round_robin     the next legal instance in cyclic order, counted in the lane
              least_tokens    inflight_context_tokens
              lmetric         (inflight_prefill_tokens + prompt - hit) * (inflight + 1)
              least_work      queue_s + prefill_s + (predicted in flight + predicted) / decode_tokens_per_s
              mooncake        queue_s + prefill_s
              llumnix         load, as below; params: mode, watermark, urgent_load
              infaas          load, as below; params: watermark
    preempt   engine          0
              last            the newest admission, which the frame has in its first row
              lowest_priority largest priority, then latest arrival
              largest         most KV
              cheapest        (prefill_s + copy_s) / kv_tokens
              least_left      most predicted output left; params: 1 turns it round
              of the two answers for a victim the one of least prefill_s + copy_s
    migrate   stay            0
              llumnix         source of load > -low and destination of load < -high, the greatest difference;
                              params: mode, low, high, urgent_load
              infaas          the same without the queue in the load; params: low, high, watermark
              greedy          the most seconds won for the request that goes; params: least seconds
    move      default         0
              shortest        largest priority, then least KV
    budget    keep            0
              fixed           the largest cap up to params[0] tokens
              tpot            the largest cap whose iteration takes at most params[0] * slo_tpot_s
              where no cap is small enough, the smallest

Load is the negated freeness of Llumnix, tokens for each request; an idle instance has -infinity:

    paper     -(capacity - held - head's demand - reserve) / running
    artifact  -((1 - watermark) * capacity - held - demand of all waiting - reserve) / n
              n = running + waiting for dispatch, running + [any waiting] for migration
    infaas    -((1 - watermark - kv_usage) * capacity) / running
    reserve = max(0, capacity - urgent_load) where urgent requests are in flight, else 0

A frame knows tokens in flight and what running requests hold (scraped) and so, by difference, the demand of
those that wait; the head's demand is their mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy import float64

from servegym.envs.cluster import schema
from servegym.envs.cluster.kernel import inlined, kernel
from servegym.envs.cluster.observe import (
    AVAILABLE,
    CONTEXT_TOKENS,
    COPY,
    DECODE_SPEED,
    INFLIGHT,
    ITERATION,
    KV_CAPACITY,
    KV_USAGE,
    PREDICTED_TOKENS,
    PREEMPTIONS,
    PREFILL,
    PREFILL_CAP,
    PREFILL_TOKENS,
    PREFIX_HIT,
    QUEUE,
    RUNNING,
    STEP_AFTER,
    URGENT,
    Frame,
)
from servegym.envs.cluster.rule_names import MODES, PARAMS, RULES
from servegym.errors import InputError

_PAPER = MODES.index("paper")
_DISPATCH, _PREEMPT, _MIGRATE, _MOVE, _BUDGET = map(
    schema.KINDS.index, ("dispatch", "preempt", "migrate", "move", "budget")
)
_, _LEAST_REQUEST, _ROUND_ROBIN, _LEAST_TOKENS, _LMETRIC, _LEAST_WORK, _MOONCAKE, _LLUMNIX, _INFAAS = range(9)
_, _, _LAST, _LOWEST_PRIORITY, _LARGEST, _CHEAPEST, _LEAST_LEFT = range(7)
_, _, _MIGRATE_LLUMNIX, _MIGRATE_INFAAS, _GREEDY = range(5)
_, _, _SHORTEST = range(3)
_, _, _FIXED, _TPOT = range(4)

_PROMPT, _PREDICTED, _PRIORITY, _SLO_TPOT, _WAITED, _LEFT, _KV, _IS_RUNNING, _SOURCE_STEP, _SOURCE_QUEUE = (
    schema.column(schema.REQUEST, name)
    for name in (
        "prompt_tokens",
        "predicted_output_tokens",
        "priority",
        "slo_tpot_s",
        "waited_s",
        "predicted_left_tokens",
        "kv_tokens",
        "running",
        "source_step_s",
        "source_queue_s",
    )
)


def _default_params() -> dict[str, np.ndarray]:
    # Llumnix's artifact: vLLM's watermark, tokens of load beside urgent requests, 3 blocks of 16 tokens.
    watermark, urgent_load, threshold = 0.01, 1600.0, 48.0
    published = {
        ("dispatch", "llumnix"): (_PAPER, watermark, urgent_load),
        ("dispatch", "infaas"): (watermark,),
        ("migrate", "llumnix"): (_PAPER, threshold, threshold, urgent_load),
        ("migrate", "infaas"): (threshold, threshold, watermark),
        ("migrate", "greedy"): (0.5,),
        ("budget", "fixed"): (512.0,),  # Sarathi-Serve's budget under a strict service level
        ("budget", "tpot"): (1.0,),
    }
    tables = {kind: np.zeros((len(names), PARAMS)) for kind, names in RULES.items()}
    for (kind, name), values in published.items():
        tables[kind][RULES[kind].index(name), : len(values)] = values
    return tables


DEFAULT_PARAMS = _default_params()  # float64 [rules of the kind, PARAMS]
_WATERMARK = DEFAULT_PARAMS["dispatch"][_LLUMNIX, 1]


def plays(rules: Mapping[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Who answers each kind of question.

    Args:
        rules: kind -> name of its rule; kinds that are not named are the agent's.

    Returns:
        int64 [KINDS], index of each kind's rule, and float64 [KINDS, PARAMS], its parameters.

    Raises:
        InputError: no such kind or rule.
    """
    chosen, params = np.zeros(len(schema.KINDS), np.int64), np.zeros((len(schema.KINDS), PARAMS))
    for kind, name in rules.items():
        if kind not in RULES:
            raise InputError("rules", "kind", kind, f"choose from {', '.join(RULES)}")
        if name not in RULES[kind]:
            raise InputError("rules", kind, name, f"choose from {', '.join(RULES[kind])}")
        k, rule = schema.KINDS.index(kind), RULES[kind].index(name)
        chosen[k], params[k] = rule, DEFAULT_PARAMS[kind][rule]
    return chosen, params


@kernel
def answer(world, frame: Frame, l: int, rule: int, params: np.ndarray) -> int:
    """A rule's answer to the question in the lane's row of the frame.

    Args:
        world: only round robin's place in the lane is read and written.
        rule: index into RULES of the question's kind.
        params: float64 [PARAMS].

    Returns:
        A legal candidate; 0 where the rule has no other.
    """
    if frame.kind[l] == _DISPATCH and rule == _ROUND_ROBIN:
        return _round_robin(world, frame, l)
    return choose(frame, l, rule, params)


@kernel
def answer_lanes(frame: Frame, kind: int, rule: int, params: np.ndarray, answers: np.ndarray) -> None:
    """One rule's answers, int64 [L], to the questions of its kind; 0 to others."""
    for l in range(len(answers)):
        answers[l] = choose(frame, l, rule, params) if frame.kind[l] == kind else 0


@kernel
def choose(frame, l, rule, params):
    """As `answer`, for every rule but round robin."""
    best, least = 0, (math.inf, math.inf, math.inf)
    for k in range(1, frame.mask.shape[1]):
        if frame.mask[l, k]:
            wanted, key = _score(frame, l, k, rule, params)
            # The first counts even at infinite cost.
            if wanted and (best == 0 or key < least):
                best, least = k, key
    return best


@kernel
def _round_robin(world, frame, l):
    lane = world.lane[l]
    for _ in range(lane.instances):
        i = lane.turn % lane.instances
        lane.turn += 1
        if frame.mask[l, i + 1]:
            return i + 1
    return 0


@inlined
def _score(frame, l, k, rule, params):
    """Whether the rule wants candidate k, and its score; the second and third number break ties."""
    kind = frame.kind[l]
    request = frame.requests[l, frame.candidates[l, k, 0]]
    edge = frame.edges[l, k]
    node = frame.instances[l, frame.candidates[l, k, 1]]
    if kind == _DISPATCH:
        return True, (_dispatch_cost(node, request, edge, rule, params), 0.0, 0.0)
    if kind == _PREEMPT:
        first, second = _victim(frame.candidates[l, k, 0], request, edge, rule, params)
        return rule >= _LAST, (first, second, _comeback_s(edge))
    if kind == _MIGRATE:
        source = frame.instances[l, frame.candidates[l, k, 2]]
        return _pair(source, node, request, edge, rule, params)
    if kind == _MOVE:
        return rule == _SHORTEST, (-float64(request[_PRIORITY]), float64(request[_KV]), 0.0)
    if kind == _BUDGET and rule >= _FIXED:
        cap = float64(edge[PREFILL_CAP])
        if rule == _FIXED:
            small_enough = cap <= params[0]
        else:
            small_enough = edge[ITERATION] <= params[0] * request[_SLO_TPOT]
        return True, (0.0, -cap, 0.0) if small_enough else (1.0, cap, 0.0)
    return False, (0.0, 0.0, 0.0)


# --- dispatch ---------------------------------------------------------------------------------------------


@inlined
def _dispatch_cost(node, request, edge, rule, params):
    # In float64: products of counts and tokens pass what float32 holds, and rounding makes ties.
    if rule == _LEAST_REQUEST:
        return float64(node[INFLIGHT])
    if rule == _LEAST_TOKENS:
        return float64(node[CONTEXT_TOKENS])
    if rule == _LMETRIC:
        new = float64(request[_PROMPT]) - float64(edge[PREFIX_HIT])
        return (float64(node[PREFILL_TOKENS]) + new) * (float64(node[INFLIGHT]) + 1.0)
    if rule == _LEAST_WORK:
        speed = max(float64(node[DECODE_SPEED]), 1.0)
        own = float64(edge[PREFILL]) + float64(request[_PREDICTED]) / speed
        return float64(edge[QUEUE]) + float64(node[PREDICTED_TOKENS]) / speed + own
    if rule == _MOONCAKE:
        return float64(edge[QUEUE]) + float64(edge[PREFILL])
    if rule == _INFAAS:
        return _infaas_load(node, params[0])
    if params[0] == _PAPER:
        return _paper_load(node, params[2])
    return _artifact_load(node, float64(node[INFLIGHT]), params[1], params[2])


# --- load of Llumnix --------------------------------------------------------------------------------------


@inlined
def _load(free, requests):
    return -free / max(requests, 1.0) if requests > 0.0 else -math.inf


@inlined
def _reserve(node, urgent_load):
    return max(0.0, float64(node[KV_CAPACITY]) - urgent_load) if node[URGENT] > 0.0 else 0.0


@inlined
def _paper_load(node, urgent_load):
    capacity, context = float64(node[KV_CAPACITY]), float64(node[CONTEXT_TOKENS])
    inflight = float64(node[INFLIGHT])
    running = min(float64(node[RUNNING]), inflight)
    held = min(float64(node[KV_USAGE]) * capacity, context)
    head = (context - held) / max(inflight - running, 1.0)
    return _load(capacity - held - head - _reserve(node, urgent_load), running)


@inlined
def _artifact_load(node, requests, watermark, urgent_load):
    free = (1.0 - watermark) * float64(node[KV_CAPACITY]) - float64(node[CONTEXT_TOKENS])
    return _load(free - _reserve(node, urgent_load), requests)


@inlined
def _infaas_load(node, watermark):
    free = (1.0 - watermark - float64(node[KV_USAGE])) * float64(node[KV_CAPACITY])
    return _load(free, float64(node[RUNNING]))


# --- preemption and migration -----------------------------------------------------------------------------


@inlined
def _comeback_s(edge):
    """Seconds of work to let a victim go and bring it back."""
    return float64(edge[PREFILL]) + float64(edge[COPY])


@inlined
def _victim(row, request, edge, rule, params):
    """How much a request should be kept, and what decides between equals."""
    if rule == _LAST:
        return float64(row), 0.0
    if rule == _LOWEST_PRIORITY:
        return -float64(request[_PRIORITY]), float64(request[_WAITED])
    if rule == _LARGEST:
        return -float64(request[_KV]), 0.0
    if rule == _CHEAPEST:
        return _comeback_s(edge) / max(float64(request[_KV]), 1.0), 0.0
    left = float64(request[_LEFT])
    return (left if params[0] else -left), 0.0


@inlined
def _pair(source, target, request, edge, rule, params):
    """As `_score`, for a source and a destination of a migration."""
    draining = source[AVAILABLE] == 0.0
    if rule == _GREEDY:
        gain = _gain_s(request, edge)
        return draining or gain > params[0], (0.0 if draining else 1.0, -gain, 0.0)
    if rule == _MIGRATE_LLUMNIX:
        mode, low, high = params[0], params[1], params[2]
        source_load = _migration_load(source, mode, params[3])
        target_load = _migration_load(target, mode, params[3])
        # The artifact also takes from whom it preempted, and never gives to such.
        pressed = mode != _PAPER and source[PREEMPTIONS] > 0.0
        able = mode == _PAPER or target[PREEMPTIONS] == 0.0
    else:
        low, high = params[0], params[1]
        source_load, target_load = _infaas_load(source, params[2]), _infaas_load(target, params[2])
        pressed, able = False, True
    if draining:
        source_load = math.inf
    wanted = (pressed or source_load > -low) and able and target_load < min(-high, source_load)
    return wanted and rule >= _MIGRATE_LLUMNIX, (-source_load, target_load, 0.0)


@inlined
def _migration_load(node, mode, urgent_load):
    if mode == _PAPER:
        return _paper_load(node, urgent_load)
    running = min(float64(node[RUNNING]), float64(node[INFLIGHT]))
    waiting = 1.0 if node[INFLIGHT] > running else 0.0
    return _artifact_load(node, running + waiting, _WATERMARK, urgent_load)


@inlined
def _gain_s(request, edge):
    """Seconds that a request is predicted to finish earlier for moving."""
    left = float64(request[_LEFT])
    here = left * float64(request[_SOURCE_STEP])
    there = left * float64(edge[STEP_AFTER]) + float64(edge[COPY]) + float64(edge[PREFILL])
    if request[_IS_RUNNING] == 0.0:
        here += float64(request[_SOURCE_QUEUE])
        there += float64(edge[QUEUE])
    return here - there
