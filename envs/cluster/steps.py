"""One step of a lane: the agent's answer, the cluster up to its next question, reward and autoreset.

`step_lane` is all that a vector environment does for a lane; roll-outs that infer inside the lanes call it
too. It touches nothing outside its lane, so any division of the lanes among threads gives the same results.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from servegym.envs.cluster import engine
from servegym.envs.cluster.address import by_address
from servegym.envs.cluster.kernel import inlined, kernel
from servegym.envs.cluster.lane import AGENT, advance, close_tick, dispatch, move, restart, take_pair
from servegym.envs.cluster.observe import PREFILL_CAP, SWAP, copy_frame, observe_end, start_frame
from servegym.envs.cluster.offers import offer_movers, offer_pairs
from servegym.envs.cluster.preemption import default_victim, preempt
from servegym.envs.cluster.questions import observe
from servegym.envs.cluster.reward import collect
from servegym.envs.cluster.rules import answer
from servegym.envs.cluster.scrape import mix
from servegym.envs.cluster.state import DISPATCH, END, LANE, MIGRATE, MOVE, NONE, PREEMPT, PS, World


@by_address
class Rules(NamedTuple):
    """Who answers, and how episodes are chosen, rewarded and ended.

    Attributes:
        reward: index into `scenario.REWARDS`.
        max_steps: decisions after which an episode is truncated.
        same_step: whether the step that ends an episode also starts the next.
        in_order: whether lane l plays episode l first, instead of a random one.
        group_size: lanes in a row that play the same episodes; in order, a group counts as one lane.
        plays: int64 [KINDS], 0 for the agent, else the number of the built-in rule that answers the kind.
        params: float64 [KINDS, 4], parameters of those rules.
    """

    reward: int
    max_steps: int
    same_step: bool
    in_order: bool
    group_size: int
    plays: np.ndarray
    params: np.ndarray


@by_address
class Transition(NamedTuple):
    """What a step returns beside the observation; arrays [L]."""

    reward: np.ndarray
    elapsed_s: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray


@by_address
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
def apply(world, frame, l, choice):
    """Give effect to candidate `choice`, which is legal, of the open question that `frame` shows."""
    lane = world.lane[l]
    kind = lane.question
    row, instance = frame.candidates[l, choice, 0], np.int64(frame.candidates[l, choice, 1])
    if kind == DISPATCH:
        dispatch(world, l, instance)
    elif kind == MIGRATE:
        if choice:
            take_pair(world, l, np.int64(frame.candidates[l, choice, 2]), instance)
        else:
            close_tick(world, l)
    elif kind == MOVE:
        move(world, l, np.int64(world.offer[l, row]))
    elif kind == PREEMPT:
        i = lane.asker
        r, by_swap = default_victim(world, l, i), world.setting[lane.fleet, i].by_swap
        if choice:
            r, by_swap = np.int64(world.offer[l, row]), frame.edges[l, choice, SWAP] > 0.0
        preempt(world, l, i, r, by_swap, lane.now)
        lane.question = NONE
    else:
        if choice:
            engine.set_cap(world, l, lane.asker, np.int64(frame.edges[l, choice, PREFILL_CAP]))
        lane.question = NONE


@kernel
def run_to_question(world, frame, l, rules):
    """Run lane l to the agent's next question; built-in rules answer the others.

    Returns:
        its kind, observed in `frame`; END with the final observation at the end of the episode.
    """
    lane = world.lane[l]
    while True:
        kind = MOVE if lane.question == MOVE else advance(world, l, AGENT)
        if kind == END:
            observe_end(world, frame, l)
            return END
        if kind == MIGRATE and not offer_pairs(world, l):
            close_tick(world, l)
            continue
        if kind == MOVE and offer_movers(world, l, lane.asker, lane.target) < 2:
            move(world, l, np.int64(world.offer[l, 0]))
            continue
        observe(world, frame, l)
        rule = rules.plays[kind]
        if rule == AGENT:
            engine.accrue(lane, lane.now)
            return kind
        apply(world, frame, l, answer(world, frame, l, rule, rules.params[kind]))


@kernel
def begin(world, frame, rules, l):
    """Start the lane's next episode and run it to the first question, if there is any."""
    lane = world.lane[l]
    # The first built-in rule of each kind is what engine and cluster do unasked.
    lane.raises = 0
    for kind in range(len(rules.plays)):
        lane.raises |= (rules.plays[kind] != 1) << kind
    restart(world, l, _next_episode(world, rules, l))
    start_frame(world, frame, l)
    run_to_question(world, frame, l, rules)
    lane.decided_at = lane.now


@inlined
def step_lane(world, frame, final, finished, out, rules, action, l):
    """Answer the open question with candidate `action`, which is legal, and run to the next one.

    An episode that asked nothing stands at its end, and any answer ends it. `frame` receives the observation,
    `final` that of an episode's end where the next starts in the same step, `finished` the ended episode,
    `out` the transition.
    """
    lane = world.lane[l]
    if (out.terminated[l] or out.truncated[l]) and not rules.same_step:
        begin(world, frame, rules, l)
        out.reward[l] = out.elapsed_s[l] = 0.0
        out.terminated[l] = out.truncated[l] = False
        return
    at_end = lane.question == NONE
    if not at_end:
        apply(world, frame, l, action)
        lane.decisions += 1
        at_end = run_to_question(world, frame, l, rules) == END
    out.reward[l] = collect(lane, rules.reward)
    out.elapsed_s[l] = (lane.now - lane.decided_at) / PS
    lane.decided_at = lane.now
    out.terminated[l] = at_end
    out.truncated[l] = not at_end and lane.decisions >= rules.max_steps
    if out.terminated[l] or out.truncated[l]:
        finished.lane[l] = world.lane[l]
        for r in range(lane.rows):
            finished.req[l, r] = world.req[l, r]
        if rules.same_step:
            copy_frame(frame, l, final, l)
            begin(world, frame, rules, l)


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
