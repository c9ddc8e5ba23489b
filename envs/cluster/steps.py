"""One step of a lane: the agent's answer, the cluster up to its next question, reward and autoreset.

`step_lane` is all that a vector environment does for a lane; roll-outs that infer inside the lanes call it
too. It touches nothing outside its lane, so any division of the lanes among threads gives the same results.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from servegym.envs.cluster.kernel import inlined, kernel
from servegym.envs.cluster.lane import AGENT, advance, dispatch, restart
from servegym.envs.cluster.observe import copy_frame, observe_dispatch, observe_end, start_frame
from servegym.envs.cluster.reward import collect
from servegym.envs.cluster.scrape import mix
from servegym.envs.cluster.state import END, LANE, PS, World


class Rules(NamedTuple):
    """How episodes are chosen, rewarded and ended.

    Attributes:
        reward: index into `scenario.REWARDS`.
        max_steps: decisions after which an episode is truncated.
        same_step: whether the step that ends an episode also starts the next.
        in_order: whether lane l plays episode l first, instead of a random one.
        group_size: lanes in a row that play the same episodes; in order, a group counts as one lane.
    """

    reward: int
    max_steps: int
    same_step: bool
    in_order: bool
    group_size: int


class Transition(NamedTuple):
    """What a step returns beside the observation; arrays [L]."""

    reward: np.ndarray
    elapsed_s: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray


class Finished(NamedTuple):
    """The latest finished episode of each lane: the fields of World that records are made of."""

    lane: np.ndarray
    req: np.ndarray


def make_transition(lanes: int) -> Transition:
    """Buffers for L lanes."""
    return Transition(np.zeros(lanes), np.zeros(lanes), np.zeros(lanes, bool), np.zeros(lanes, bool))


def make_finished(world: World) -> Finished:
    """Buffers for the lanes of a world; `plays` is 0 until a lane has finished an episode."""
    return Finished(np.zeros(len(world.lane), LANE), np.zeros_like(world.req))


@kernel
def _next_episode(world, rules, l):
    lane = world.lane[l]
    episodes = world.episode.shape[0]
    if rules.in_order and lane.plays == 0:
        return l // rules.group_size % episodes
    return np.int64(mix(lane.seed, lane.plays) % np.uint64(episodes))


@kernel
def begin(world, frame, rules, l):
    """Start the lane's next episode and run it to the first decision."""
    restart(world, l, _next_episode(world, rules, l))
    start_frame(world, frame, l)
    advance(world, l, AGENT)
    lane = world.lane[l]
    lane.decided_at = lane.now
    observe_dispatch(world, frame, l)


@inlined
def step_lane(world, frame, final, finished, out, rules, action, l):
    """Give the pending request to candidate `action`, which is legal, and run to the next decision.

    `frame` receives the observation, `final` that of an episode's end where the next starts in the same
    step, `finished` the ended episode, `out` the transition.
    """
    lane = world.lane[l]
    if (out.terminated[l] or out.truncated[l]) and not rules.same_step:
        begin(world, frame, rules, l)
        out.reward[l] = out.elapsed_s[l] = 0.0
        out.terminated[l] = out.truncated[l] = False
        return
    dispatch(world, l, lane.default if action == 0 else action - 1)
    lane.decisions += 1
    at_end = advance(world, l, AGENT) == END
    out.reward[l] = collect(lane, rules.reward)
    out.elapsed_s[l] = (lane.now - lane.decided_at) / PS
    lane.decided_at = lane.now
    out.terminated[l] = at_end
    out.truncated[l] = not at_end and lane.decisions >= rules.max_steps
    if at_end:
        observe_end(world, frame, l)
    else:
        observe_dispatch(world, frame, l)
    if out.terminated[l] or out.truncated[l]:
        finished.lane[l] = world.lane[l]
        for r in range(lane.rows):
            finished.req[l, r] = world.req[l, r]
        if rules.same_step:
            copy_frame(frame, final, l)
            begin(world, frame, rules, l)


@kernel
def begin_lanes(world, frame, out, rules, first, last):
    """Start the next episode of lanes first..last-1."""
    for l in range(first, last):
        begin(world, frame, rules, l)
        out.terminated[l] = out.truncated[l] = False


@kernel
def step_lanes(world, frame, final, finished, out, rules, actions, first, last):
    """Step lanes first..last-1."""
    for l in range(first, last):
        step_lane(world, frame, final, finished, out, rules, actions[l], l)


@kernel
def first_illegal(frame, out, rules, actions):
    """The first lane whose answer is not a legal candidate, or -1; lanes about to be reset take any."""
    for l in range(len(actions)):
        if (out.terminated[l] or out.truncated[l]) and not rules.same_step:
            continue
        if actions[l] < 0 or actions[l] >= frame.mask.shape[1] or frame.mask[l, actions[l]] == 0:
            return l
    return -1
