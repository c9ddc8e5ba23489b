"""The arrays of one observation, from a `ClusterView`: what all kinds of questions have in common.

Each array gets a leading dimension of one; there is no padding beyond the view's instances.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import NamedTuple

import numpy as np

from servegym.envs.cluster import schema
from servegym.runtime.view import ClusterView, RequestView


@dataclass(frozen=True, slots=True)
class Stay:
    """Nothing changes."""


@dataclass(frozen=True, slots=True)
class Dispatch:
    """The request goes to an instance."""

    instance: int


@dataclass(frozen=True, slots=True)
class Preempt:
    """A running request gives way; by swap its KV goes to host memory, else it is computed again."""

    key: Hashable
    swap: bool


@dataclass(frozen=True, slots=True)
class Pair:
    """Something moves from a source to a target; `ask_move` asks what."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Move:
    """A request moves."""

    key: Hashable
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Cap:
    """From the next iteration on prompts get at most so many tokens of the instance's budget."""

    instance: int
    tokens: int


Action = Stay | Dispatch | Preempt | Pair | Move | Cap
STAY = Stay()


class Question(NamedTuple):
    """One question.

    Attributes:
        kind: of `schema.KINDS`.
        obs: arrays of `servegym.envs.cluster.schema`, each with a leading dimension of 1.
        actions: what each legal candidate does; the others are absent.
    """

    kind: str
    obs: dict[str, np.ndarray]
    actions: dict[int, Action]

    @property
    def is_open(self) -> bool:
        """Whether there is anything to choose beside candidate 0."""
        return len(self.actions) > 1


def _columns(features: tuple[schema.Feature, ...]) -> dict[str, int]:
    return {feature.name: k for k, feature in enumerate(features)}


NODE, REQUEST, EDGE = map(_columns, (schema.INSTANCE, schema.REQUEST, schema.EDGE))
# What changes of an instance, in the order in which `observe_instances` collects it; `Books` come first.
_CHANGING = (
    "inflight", "inflight_context_tokens", "inflight_predicted_tokens", "available", "running",
    "waiting", "kv_usage", "preemptions", "scrape_age", "inflight_prefill_tokens", "prefill_budget",
    "urgent_inflight", "host_usage", "engaged",
)  # fmt: skip
_COLUMNS = np.array([NODE[name] for name in _CHANGING])
_KINDS = {kind: np.array([k]) for k, kind in enumerate(schema.KINDS)}
_KV_USAGE, DECODE_STEP = NODE["kv_usage"], NODE["decode_step_s"]


class Books(NamedTuple):
    """The router's books as int64 [I]: requests, context tokens and predicted tokens in flight.

    `available`, bool [I], says which instances take requests.
    """

    inflight: np.ndarray
    context: np.ndarray
    to_come: np.ndarray
    available: np.ndarray


def observe_instances(view: ClusterView) -> tuple[np.ndarray, Books]:
    """Features of all instances but `decode_step_s`, and the books behind them."""
    now, fleet = view.now_s, view.fleet
    rows = [
        (
            len(x.inflight),
            x.prompt_tokens + x.streamed_tokens,
            max(0, x.predicted_tokens - x.streamed_tokens),
            x.available,
            x.seen_running,
            x.seen_waiting,
            x.seen_kv_usage,
            x.seen_preemptions,
            now - x.scraped_at_s,
            x.prefill_tokens,
            x.prefill_cap,
            x.urgent,
            (h - x.host_free_blocks) / h if (h := x.settings.setting.host_blocks) else 0.0,
            x.engaged,
        )
        for x in view.instances
    ]
    flat = chain.from_iterable(rows)  # an array of tuples takes numpy twice as long
    changing = np.fromiter(flat, np.float64, len(rows) * len(_CHANGING)).reshape(len(rows), -1)
    nodes = fleet.nodes.copy()
    nodes[:, _COLUMNS] = changing
    inflight, context, to_come, available = changing.T[: len(Books._fields)].astype(np.int64)
    return nodes, Books(inflight, context, to_come, available != 0)


def make_question(
    view: ClusterView,
    kind: str,
    nodes: np.ndarray,
    requests: Sequence[Sequence[float]],
    candidates: np.ndarray,
    edges: np.ndarray,
    actions: dict[int, Action],
    since_s: float,
) -> Question:
    """Put the arrays together; legal is what has an action."""
    mask = np.fromiter(map(actions.__contains__, range(len(edges))), np.int8, len(edges))
    rate, tokens = view.arrivals.rates(view.now_s)
    inflight = sum(len(x.inflight) for x in view.instances)
    shared = (len(nodes), rate, tokens, since_s, inflight)
    obs = {
        "instances": nodes[None],
        "requests": np.array([requests], np.float32),
        "candidates": candidates[None],
        "edges": edges[None],
        "globals": np.array([shared], np.float32),
        "history": np.array([view.arrivals.history(view.now_s)], np.float32),
        "instance_mask": view.fleet.mask,
        "mask": mask[None],
        "kind": _KINDS[kind],
    }
    return Question(kind, obs, actions)


def blank(instances: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Candidates and edges of nothing to choose; candidate 1 + i stands for instance i."""
    candidates, edges = _blank(instances, rows)
    return candidates.copy(), edges.copy()


@cache
def _blank(instances: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    size = schema.most_candidates(instances, rows)
    candidates = np.zeros((size, 3), np.int32)
    candidates[1 : instances + 1, 1] = np.arange(instances)
    candidates[:, 2] = -1
    return candidates, np.zeros((size, len(schema.EDGE)), np.float32)


def request_row(view: ClusterView, request: RequestView, node: np.ndarray | None = None) -> list[float]:
    """A row of `requests`, [REQUEST]; `node` is the instance where it fares, None for one that arrives."""
    row = [
        request.prompt_tokens,
        request.predicted_tokens,
        request.priority,
        request.slo_ttft_s,
        request.slo_tpot_s,
        request.weight,
        view.now_s - request.arrived_s,
        request.turn,
    ]
    if node is None:
        return [*row, 0.0, request.predicted_tokens, *_NOWHERE]
    i = request.instance
    queue_s = view.instances[i].prefill_tokens / view.fleet.prefill_speed[i]
    progress = (request.streamed_tokens, request.left_tokens, request.kv_tokens, request.running)
    return [*row, *progress, request.preemptions, node[_KV_USAGE], node[DECODE_STEP], queue_s]


NOTHING = [0.0] * len(schema.REQUEST)
_NOWHERE = [0.0] * (len(schema.REQUEST) - REQUEST["kv_tokens"])
