"""From a `ClusterView` to the questions that policies answer: observations, and the actions behind answers.

Each function asks one kind of question about the view as it stands at `view.now_s`. The arrays are those that
the kernels of `servegym.envs.cluster.observe` and `.questions` write for the same state, which say what every
number means, with a leading dimension of one and no padding beyond the view's instances.

A view is read, never changed: ask as often as you like.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache

import numpy as np

from servegym.envs.cluster import schema
from servegym.errors import InputError
from servegym.runtime import offers
from servegym.runtime.fleet import SECOND
from servegym.runtime.observation import (
    DECODE_STEP,
    EDGE,
    NODE,
    NOTHING,
    STAY,
    Action,
    Cap,
    Dispatch,
    Move,
    Pair,
    Preempt,
    Question,
    Stay,
    blank,
    make_question,
    observe_instances,
    request_row,
)
from servegym.runtime.view import ClusterView, RequestView

__all__ = [
    "Action", "Cap", "Dispatch", "Move", "Pair", "Preempt", "Question", "Stay",
    "ask_budget", "ask_dispatch", "ask_migrate", "ask_move", "ask_preempt",
]  # fmt: skip
CAPS = 5  # offered caps: the token budget, halved from one to the next
LEAST_CAP = 16


# --- dispatch ---------------------------------------------------------------------------------------------


def ask_dispatch(view: ClusterView, request: RequestView, rows: int = 1) -> Question:
    """Where shall a request go that has arrived?

    Args:
        view: with `arrived(request)` told.
        rows: request rows R of the observation, as the policy was trained: 1, or `schema.OFFERS` for policies
            that answer other questions, too.

    Returns:
        a question whose only action is `Stay` where no instance takes the request.
    """
    nodes, books = observe_instances(view)
    fleet, count = view.fleet, len(nodes)
    hits = [x.cached_tokens(request, request.prompt_tokens - 1) for x in view.instances]
    n, context = books.inflight + _AFTER, books.context + request.prompt_tokens * _AFTER
    steps = fleet.step_s(np.minimum(n, fleet.max_seqs), np.minimum(context, fleet.capacity))
    nodes[:, DECODE_STEP] = steps[0]
    candidates, edges = blank(count, rows)
    edge = edges[1 : count + 1]
    edge[:, EDGE["prefix_hit_tokens"]] = hits
    edge[:, EDGE["queue_s"]] = nodes[:, NODE["inflight_prefill_tokens"]] / fleet.prefill_speed
    caps = [x.prefill_cap for x in view.instances]
    edge[:, EDGE["prefill_s"]] = fleet.prefills_s(request.prompt_tokens, hits, caps)
    edge[:, EDGE["step_after_s"]] = steps[1]
    total = books.context + books.to_come + (request.prompt_tokens + request.predicted_tokens)
    edge[:, EDGE["kv_after"]] = total / fleet.capacity
    if 0 <= request.last_instance < count:
        edge[request.last_instance, EDGE["session_last"]] = 1.0
    legal = _takers(view, request, books.available)
    actions: dict[int, Action] = {0: STAY}
    if len(legal):
        default = 1 + legal[books.inflight[legal].argmin()]
        candidates[0], edges[0] = candidates[default], edges[default]
        actions = {1 + i: _dispatch(i) for i in legal.tolist()}
        actions[0] = actions[int(default)]
    edges[0, EDGE["is_default"]] = 1.0
    requests = [request_row(view, request), *[NOTHING] * (rows - 1)]
    gap_s = view.arrivals.gap_s
    return make_question(view, "dispatch", nodes, requests, candidates, edges, actions, gap_s)


_AFTER = np.array([[0], [1]])  # a row as things are, one with the request
_dispatch = cache(Dispatch)  # frozen, and the same for every question


def _takers(view: ClusterView, request: RequestView, available: np.ndarray) -> np.ndarray:
    """Numbers of the instances that may get a request, as `offers.fits` says."""
    wanted, fleet = request.prompt_tokens + view.longest_output, view.fleet
    if wanted > fleet.least_room:
        available = available & (min(wanted, view.largest_room()) <= fleet.room)
    return available.nonzero()[0]


# --- other questions --------------------------------------------------------------------------------------


class _Draft:
    """A question in the making, about some requests on their instances."""

    def __init__(self, view: ClusterView, kind: str) -> None:
        self.view, self.kind = view, kind
        self.nodes, self.books = observe_instances(view)
        fleet = view.fleet
        running = np.minimum(self.books.inflight, fleet.max_seqs)
        steps = fleet.step_s(running, np.minimum(self.books.context, fleet.capacity))
        self.nodes[:, DECODE_STEP] = steps
        self.candidates, self.edges = blank(len(self.nodes), schema.OFFERS)
        self.requests: list[list[float]] = []
        self.actions: dict[int, Action] = {0: STAY}

    def about(self, request: RequestView) -> int:
        """Add a request; returns its row."""
        self.requests.append(request_row(self.view, request, self.nodes[request.instance]))
        return len(self.requests) - 1

    def offer(self, c: int, action: Action, row: int, instance: int, source: int = -1, **edge: float) -> None:
        """Let candidate c be legal."""
        self.actions[c] = action
        self.candidates[c] = row, instance, source
        for name, value in edge.items():
            self.edges[c, EDGE[name]] = value

    def done(self, default: int = 0) -> Question:
        """The question; candidate 0 stands for what candidate `default` does."""
        if default in self.actions:
            self.candidates[0], self.edges[0] = self.candidates[default], self.edges[default]
            self.actions[0] = self.actions[default]
        self.edges[0, EDGE["is_default"]] = 1.0
        self.requests += [NOTHING] * (schema.OFFERS - len(self.requests))
        view = self.view
        since_s = view.now_s - view.arrivals.last_s
        return make_question(
            view, self.kind, self.nodes, self.requests, self.candidates, self.edges, self.actions, since_s
        )


def ask_preempt(view: ClusterView, i: int) -> Question:
    """Which of at least two running requests gives way on instance i, which lacks memory for their tokens?

    Raises:
        InputError: fewer run there.
    """
    instance = view.instances[i]
    if len(instance.running) < 2:
        raise InputError(f"instance {i}", "running", len(instance.running), "ask where at least two run")
    draft, default, setting = _Draft(view, "preempt"), 0, instance.settings.setting
    victim = offers.default_victim(instance)
    # A decode reads the KV that it holds and that of the token it computes.
    reads = [r.kv_tokens + 1 for r in instance.running if r.decoding]
    decodes = len(reads), sum(reads)
    for request in offers.victims(instance):
        row = draft.about(request)
        _offer_victim(draft, i, row, request, decodes, swap=False)
        swaps = 0 < instance.settings.blocks_of(request.kv_tokens) <= instance.host_free_blocks
        if swaps:
            _offer_victim(draft, i, row, request, decodes, swap=True)
        if request is victim:
            default = 2 + 2 * row if swaps and setting.by_swap else 1 + 2 * row
    return draft.done(default)


def _offer_victim(
    draft: _Draft, i: int, row: int, request: RequestView, decodes: tuple[int, int], swap: bool
) -> None:
    view, instance = draft.view, draft.view.instances[i]
    setting, tokens = instance.settings.setting, request.kv_tokens
    blocks = instance.settings.blocks_of(tokens)
    prefill_s = copy_s = 0.0
    if swap:
        copies = -(-blocks // setting.swap_group)
        copy_s = 2 * (setting.swap_call * copies + setting.swap_block * blocks) * SECOND
    elif tokens:
        prefill_s = view.fleet.prefill_s(i, tokens, 0, instance.prefill_cap)
    n, context = decodes
    if request.decoding:
        n, context = n - 1, context - (tokens + 1)
    held = setting.blocks - instance.free_blocks - blocks + request.shared_blocks
    draft.offer(
        1 + 2 * row + swap, Preempt(request.key, swap), row, i, swap=swap, prefill_s=prefill_s, copy_s=copy_s,
        step_after_s=view.fleet.step_of(i, n, context), kv_after=held / setting.blocks,
    )  # fmt: skip


def ask_migrate(view: ClusterView, paired: Collection[int] = ()) -> Question:
    """Between which two instances shall a request move?

    Args:
        paired: instances that moves of this occasion have used already; they take no further part in it.
    """
    draft = _Draft(view, "migrate")
    targets = offers.destinations(view, paired)
    for a, (s, request) in enumerate(offers.sources(view, paired)):
        row = draft.about(request)
        if a == 0:
            draft.candidates[0, 1] = s
        for b, d in enumerate(targets):
            if offers.is_legal_pair(view, s, d):
                _offer_move(draft, 1 + offers.DESTINATIONS * a + b, Pair(s, d), row, request, s, d)
    return draft.done()


def ask_move(view: ClusterView, source: int, target: int) -> Question:
    """Which request of the source moves to the target? Without one that may, the only action is `Stay`."""
    draft = _Draft(view, "move")
    for k, request in enumerate(offers.movers(view, source, target)):
        row = draft.about(request)
        _offer_move(draft, 1 + k, Move(request.key, source, target), row, request, source, target)
    return draft.done(default=1)


def _offer_move(
    draft: _Draft, c: int, action: Action, row: int, request: RequestView, s: int, d: int
) -> None:
    view, target = draft.view, draft.view.instances[d]
    goal, fleet = request.goal_tokens, view.fleet
    hit = target.cached_tokens(request, goal - 1)
    prefill_s = copy_s = 0.0
    if request.running:
        here = view.instances[s].settings
        copied = here.setting.net_block * here.blocks_of(request.kv_tokens)
        copy_s = (here.setting.net_call + copied) * SECOND
    else:
        prefill_s = fleet.prefill_s(d, goal - hit, hit, target.prefill_cap)
    capacity, context = int(fleet.capacity[d]), int(draft.books.context[d])
    n_after = min(int(draft.books.inflight[d]) + 1, target.settings.setting.max_seqs)
    total = context + int(draft.books.to_come[d]) + goal + request.left_tokens
    draft.offer(
        c, action, row, d, s, prefix_hit_tokens=hit, queue_s=target.prefill_tokens / fleet.prefill_speed[d],
        prefill_s=prefill_s, copy_s=copy_s, kv_after=total / capacity,
        step_after_s=fleet.step_of(d, n_after, min(context + goal, capacity)),
        session_last=request.last_instance == d,
    )  # fmt: skip


def ask_budget(view: ClusterView, i: int) -> Question:
    """How many prompt tokens may an iteration of instance i have, which decodes and has prompts to compute?

    Raises:
        InputError: no prompt is waiting or partly computed there.
    """
    instance = view.instances[i]
    prompts = [r for r in instance.running if not r.decoding and r.kv_tokens < r.goal_tokens]
    if not prompts and not instance.waiting:
        raise InputError(f"instance {i}", "waiting", 0, "ask where there are prompts to compute")
    draft, budget = _Draft(view, "budget"), instance.settings.setting.budget
    first = prompts[0] if prompts else instance.waiting[0]
    draft.about(first)
    tokens = sum(r.goal_tokens - r.kv_tokens for r in prompts) + sum(map(_uncomputed, instance.waiting))
    _offer_cap(draft, 0, STAY, i, instance.prefill_cap, first.kv_tokens, tokens)
    for k in range(CAPS):
        cap = min(max(budget >> k, LEAST_CAP), budget)
        _offer_cap(draft, 1 + k, Cap(i, cap), i, cap, first.kv_tokens, tokens)
    return draft.done()


def _uncomputed(request: RequestView) -> int:
    """Prompt tokens that a waiting request will compute: not what was cached at dispatch or was swapped."""
    return request.goal_tokens - request.kv_tokens if request.preemptions else request.booked_tokens


def _offer_cap(draft: _Draft, c: int, action: Action, i: int, cap: int, past: int, tokens: int) -> None:
    """Offer iterations of `cap` each of `tokens` prompt tokens, the first behind `past`."""
    instance = draft.view.instances[i]
    setting = instance.settings.setting
    decodes = [r.kv_tokens + 1 for r in instance.running if r.decoding]
    n = len(decodes)
    chunk = min(cap, setting.budget - n)
    sequences = min(n + 1, setting.max_seqs)
    iteration = draft.view.fleet.mixed_s(i, n, sum(decodes), chunk, past, sequences)
    passes = -(-tokens // max(chunk, 1))
    draft.offer(c, action, 0, i, prefill_cap=cap, iteration_s=iteration, queue_s=iteration * passes)
