"""What a question offers to choose from, as `servegym.envs.cluster.offers` does: the favourites of rules.

Instances are given by their number in a `ClusterView`. What decodes stands in the `running` lists with
`decoding`; of the others there, those that still have prompt to compute are partial prompts.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable
from operator import attrgetter
from typing import Any

from servegym.runtime.view import ClusterView, InstanceView, RequestView

SOURCES = DESTINATIONS = 4  # most instances on either side of a migration
Key = Callable[[RequestView], Any]


def _order(request: RequestView) -> tuple[bool, int]:
    """Order of admission; partial prompts come last, as for the engine."""
    return not request.decoding, request.admitted


def _urgency(request: RequestView) -> tuple[int, float, int]:
    """Order of scheduling under priorities, the least urgent last."""
    return request.priority, request.arrived_s, request.number


VICTIM_RULES: tuple[Key, ...] = (attrgetter("kv_tokens"), attrgetter("left_tokens"), _urgency)
MOVER_RULES: tuple[Key, ...] = (
    lambda r: (-r.kv_tokens, r.admitted),
    lambda r: (r.kv_tokens, r.admitted),
    lambda r: (r.left_tokens, r.admitted),
    lambda r: r.admitted,
)


def _distinct(requests: Iterable[RequestView | None]) -> list[RequestView]:
    return list({id(r): r for r in requests if r is not None}.values())


# --- preemption -------------------------------------------------------------------------------------------


def default_victim(instance: InstanceView) -> RequestView:
    """The running request that vLLM preempts first: the last admitted, or the largest (priority, arrival)."""
    return max(instance.running, key=_urgency if instance.settings.setting.by_priority else _order)


def victims(instance: InstanceView) -> list[RequestView]:
    """Two favourites of each rule: newest admission, largest KV, most output left, lowest priority."""
    newest = sorted(instance.running, key=_order)  # last; of equals by another rule the newest one goes
    ranked = (newest, *(sorted(newest, key=rule) for rule in VICTIM_RULES))
    return _distinct(r for rank in ranked for r in rank[:-3:-1])


# --- migration --------------------------------------------------------------------------------------------


def fits(view: ClusterView, i: int, request: RequestView) -> bool:
    """Whether instance i may get a request: it takes some, and holds the prompt and the longest output.

    A router does not know how long the output will be. The largest instance may get every request.
    """
    tokens = min(request.prompt_tokens + view.longest_output, view.largest_room())
    instance = view.instances[i]
    return instance.available and tokens <= instance.settings.room_tokens


def can_move(view: ClusterView, s: int, d: int, request: RequestView) -> bool:
    """Whether a request of instance s may go to d now: it waits without KV on the host, or decodes."""
    if s == d or not fits(view, d, request):
        return False
    if not request.decoding:
        return not request.running and request.kv_tokens == 0
    source, target = view.instances[s], view.instances[d]
    setting = target.settings.setting
    if source.engaged or target.engaged or target.joining or len(target.running) >= setting.max_seqs:
        return False
    block = source.settings.setting.block_tokens
    full = request.kv_tokens // block * block
    return target.settings.blocks_of(full) <= target.free_blocks - setting.watermark


def default_mover(instance: InstanceView) -> RequestView | None:
    """The request that leaves unless somebody says otherwise.

    The least urgent that decodes, of these the last admitted; where nothing decodes the last that waits.
    """
    decoding = [r for r in instance.running if r.decoding]
    if decoding:
        return max(decoding, key=lambda r: (r.priority, r.admitted))
    return instance.waiting[-1] if instance.waiting else None


def movers(view: ClusterView, s: int, d: int) -> list[RequestView]:
    """Requests of instance s that may go to d: the default one, favourites, the last and first that wait."""
    instance = view.instances[s]
    default = default_mover(instance)
    first = [default] if default is not None and can_move(view, s, d, default) else []
    able = [r for r in instance.running if r.decoding and can_move(view, s, d, r)]
    favourites = [max(able, key=rule) for rule in MOVER_RULES] if able else []
    ends = [r for r in (instance.waiting[-1:] + instance.waiting[:1]) if can_move(view, s, d, r)]
    return _distinct([*first, *favourites, *ends])


def is_legal_pair(view: ClusterView, s: int, d: int) -> bool:
    """Whether any request that `movers` offers may go from instance s to d."""
    instance = view.instances[s]
    some = [*instance.waiting[-1:], *instance.waiting[:1], *(r for r in instance.running if r.decoding)]
    return any(can_move(view, s, d, r) for r in some)


def freeness(instance: InstanceView) -> float:
    """Llumnix's freeness: free KV tokens less the demand of those that wait, by the batch's size."""
    tokens = instance.free_blocks * instance.settings.setting.block_tokens
    tokens -= sum(r.goal_tokens for r in instance.waiting)
    return tokens / max(len(instance.running) + bool(instance.waiting), 1)


def sources(view: ClusterView, paired: Collection[int]) -> list[tuple[int, RequestView]]:
    """Instances that may give, each with the request that would go: draining ones, then the least free.

    While a migration is in flight nothing that decodes may go: then it is the last that waits.
    """
    ranked = []
    for i, instance in enumerate(view.instances):
        decodes = not instance.engaged and any(r.decoding for r in instance.running)
        if i not in paired and (instance.waiting or decodes):
            ranked.append((instance.available, freeness(instance), i))
    chosen = [(i, view.instances[i]) for *_, i in heapq.nsmallest(SOURCES, ranked)]
    movers = ((i, x.waiting[-1] if x.engaged else default_mover(x)) for i, x in chosen)
    return [(i, mover) for i, mover in movers if mover is not None]


def destinations(view: ClusterView, paired: Collection[int]) -> list[int]:
    """Instances that may take: the freest, those with a migration in flight, which take no KV, last."""
    ranked = [
        (instance.engaged or instance.joining, -freeness(instance), i)
        for i, instance in enumerate(view.instances)
        if i not in paired and instance.available
    ]
    return [i for *_, i in heapq.nsmallest(DESTINATIONS, ranked)]
