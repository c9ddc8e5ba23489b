"""Why an answer is not legal: the sentence that an agent's author reads."""

from __future__ import annotations

import numpy as np

from servegym.envs.cluster.observe import Frame
from servegym.envs.cluster.offers import DESTINATIONS, SOURCES
from servegym.envs.cluster.schema import KINDS
from servegym.envs.cluster.state import NONE, World

_ASK_MASK = "choose where mask is 1"


def reason(world: World, frame: Frame, lane: int, action: int) -> str:
    """What keeps a lane's open question from being answered so.

    Args:
        world, frame: the lane's state and its observation; `frame.mask[lane, action]` is 0, or `action` lies
            outside of it.
        lane: the lane.
        action: the answer.
    """
    most = frame.mask.shape[1] - 1
    if not 0 <= action <= most:
        return f"answers lie in 0..{most}"
    if world.lane[lane]["unfinished"] == 0:
        return "nothing is left to decide; answer 0"
    kind = KINDS[frame.kind[lane]]
    return _REASONS[kind](world, frame, lane, action) + f"; {_ASK_MASK}"


def _dispatch(world: World, frame: Frame, lane: int, action: int) -> str:
    state = world.lane[lane]
    i = action - 1
    if i >= state["instances"]:
        return f"the cluster has {state['instances']} instances"
    if world.setting[state["fleet"], i]["drain"] <= state["now"]:
        return f"instance {i} is draining"
    return f"the request does not fit into the KV memory of instance {i}"


def _preempt(world: World, frame: Frame, lane: int, action: int) -> str:
    row, by_swap = divmod(action - 1, 2)
    if not frame.mask[lane, 1 + 2 * row] or not by_swap:
        return f"{_rows(frame, lane, 1, 2)} requests are offered, and this answer names none of them"
    state = world.lane[lane]
    asker = state["asker"]
    if world.setting[state["fleet"], asker]["host_blocks"] == 0:
        return f"instance {asker} has no host memory to swap to (swap_gib is 0)"
    return f"no host memory is free on instance {asker} for the KV of request {row}"


def _migrate(world: World, frame: Frame, lane: int, action: int) -> str:
    a, b = divmod(action - 1, DESTINATIONS)
    offered = world.offer[lane, :SOURCES]
    sources = world.req[lane]["instance"][offered[offered != NONE]].tolist()
    if a >= len(sources):
        return f"{len(sources)} sources are offered, and this answer names none of them"
    receivers = world.receiver[lane]
    destinations = receivers[receivers != NONE].tolist()
    if b >= len(destinations):
        instances = range(world.lane[lane]["instances"])
        excluded = [_unavailable(world, lane, i) for i in instances if i not in destinations]
        return "; ".join([f"{len(destinations)} destinations are offered", *filter(None, excluded)])
    source, destination = sources[a], destinations[b]
    if source == destination:
        return f"a request cannot move to its own instance ({source})"
    lacking = f"instance {destination} lacks memory or a place for any request of instance {source}"
    return _engaged(world, lane, source) or _unavailable(world, lane, destination) or lacking


def _unavailable(world: World, lane: int, i: int) -> str | None:
    """What keeps an instance from being the destination of a migration."""
    state = world.lane[lane]
    if world.setting[state["fleet"], i]["drain"] <= state["now"]:
        return f"instance {i} is draining"
    return _engaged(world, lane, i)


def _engaged(world: World, lane: int, i: int) -> str | None:
    """What keeps an instance from being the source or the destination of a migration."""
    state, instance = world.lane[lane], world.instance[lane, i]
    if instance["paired"] == state["now"]:
        return f"instance {i} is already part of a pair of this tick"
    if any(instance[name] != NONE for name in ("out", "inbound", "joiner")):
        return f"instance {i} is already part of a migration"
    return None


def _move(world: World, frame: Frame, lane: int, action: int) -> str:
    state = world.lane[lane]
    if action > _rows(frame, lane, 1, 1):
        return f"{_rows(frame, lane, 1, 1)} requests of instance {state['asker']} are offered"
    return f"request {action - 1} cannot move to instance {state['target']}: memory or a place is lacking"


def _budget(world: World, frame: Frame, lane: int, action: int) -> str:
    return f"a budget has answers 0..{np.flatnonzero(frame.mask[lane])[-1]}"


def _rows(frame: Frame, lane: int, first: int, step: int) -> int:
    """How many requests are offered, each behind its own answer."""
    return int(frame.mask[lane, first::step].sum())


_REASONS = {
    "dispatch": _dispatch,
    "preempt": _preempt,
    "migrate": _migrate,
    "move": _move,
    "budget": _budget,
}
