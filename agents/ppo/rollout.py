"""Roll-outs inside the lanes: observe, decide, step, all in one kernel call a thread.

Neither Python nor torch is in the loop. The lanes of a group meet the same arrivals, but their own answers
decide how many questions they are asked. So the next decision of a group is always that of the lane that is
furthest behind in simulated time: the lanes stay side by side, and their advantages can be compared.

What is drawn depends on seed, lane and the lane's number of decisions only: results do not depend on the
number of threads, and a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from servegym.envs.cluster.crew import Crew
from servegym.envs.cluster.kernel import decorators
from servegym.envs.cluster.observe import Frame, copy_frame
from servegym.envs.cluster.scrape import mix, uniform
from servegym.envs.cluster.state import PS
from servegym.envs.cluster.steps import step_lane
from servegym.envs.cluster.vector import ClusterVectorEnv
from servegym.models import inlane, simd
from servegym.models.config import NetworkConfig
from servegym.models.features import ARRAYS
from servegym.models.packing import load_weights, make_scratch, make_weights

kernel, inlined = decorators(simd.__file__, inlane.__file__)
_DRAWS = 0x0D15EA5E  # sets the stream of draws apart from those of episodes and scrapes with the same seed


class Steps(NamedTuple):
    """T B decisions of B lanes; arrays [T, B].

    The decisions of a group of G lanes, columns g G to g G + G - 1, stand row by row in order of simulated
    time; `lane` says whose each is. Where all lanes are asked at the same times, that is the column.

    `values` and `next_values` are in the units of the trainer's normaliser; next_values is that of the final
    observation where an episode was truncated and 0 elsewhere. `now_s` is the simulated time of the decision
    in the lane's `plays`-th episode. `returns` and `lengths` are those of the episodes that ended there, 0
    elsewhere.
    """

    lane: np.ndarray  # int64
    actions: np.ndarray  # int64
    log_probs: np.ndarray  # float32
    values: np.ndarray  # float32
    next_values: np.ndarray  # float32
    rewards: np.ndarray  # float64
    elapsed_s: np.ndarray  # float64
    terminated: np.ndarray  # bool
    truncated: np.ndarray  # bool
    now_s: np.ndarray  # float64
    plays: np.ndarray  # int64
    returns: np.ndarray  # float64
    lengths: np.ndarray  # int64


class Tally(NamedTuple):
    """What a lane carries from one roll-out to the next; arrays [B]."""

    decisions: np.ndarray  # int64; over the whole training
    episode_return: np.ndarray  # float64; of the episode in progress
    episode_length: np.ndarray  # int64; decisions
    last_values: np.ndarray  # float32; of the question that is open now, in the normaliser's units


def make_steps(steps: int, lanes: int) -> Steps:
    """Zeroed memory of a roll-out."""
    kinds: dict[str, type] = dict.fromkeys(("lane", "actions", "plays", "lengths"), np.int64)
    kinds |= dict.fromkeys(("terminated", "truncated"), bool)
    kinds |= dict.fromkeys(("log_probs", "values", "next_values"), np.float32)
    return Steps(**{name: np.zeros((steps, lanes), kinds.get(name, np.float64)) for name in Steps._fields})


def make_tally(lanes: int) -> Tally:
    """Episodes that begin."""
    return Tally(
        np.zeros(lanes, np.int64), np.zeros(lanes), np.zeros(lanes, np.int64), np.zeros(lanes, np.float32)
    )


class Collector:
    """Plays the lanes of an environment with a network, on its own threads.

    Args:
        env: has been reset.
        network: size of the network.
        num_threads: threads that share the groups of lanes.
        seed: of the draws.
    """

    def __init__(self, env: ClusterVectorEnv, network: NetworkConfig, num_threads: int, seed: int) -> None:
        self._lanes, self._seed = env.lanes(), seed
        self._weights = make_weights(network.hidden, network.layers)
        frame = self._lanes.frame
        sizes = (frame.instances.shape[1], frame.requests.shape[1], frame.mask.shape[1])
        groups = env.num_envs // env.group_size
        bounds = np.linspace(0, groups, min(num_threads, groups) + 1).astype(int).tolist()
        self._crew = Crew(
            [(make_scratch(self._weights, *sizes), first, last) for first, last in pairwise(bounds)]
        )

    def run(
        self,
        weights: Mapping[str, np.ndarray],
        obs: Mapping[str, np.ndarray],
        steps: Steps,
        tally: Tally,
    ) -> None:
        """Play T decisions a lane.

        Args:
            weights: of the network, as in `policy.safetensors`.
            obs: receives the observations, [T, B, ...] by name.
            steps: receives the rest.
            tally: is read and brought up to date.
        """
        load_weights(self._weights, weights)
        rows = steps.actions.size
        store = Frame(
            **{name: obs[name].reshape(rows, *obs[name].shape[2:]) for name in ARRAYS},
            oracle=np.empty((rows, self._lanes.frame.oracle.shape[1])),
        )
        asked = np.empty((len(tally.decisions), 2), np.int64)
        self._crew.run(
            _play_groups, self._lanes, self._weights, store, steps, tally, np.uint64(self._seed), asked
        )

    def close(self) -> None:
        """End the threads."""
        self._crew.close()


@inlined
def draw(logits, legal, count, bits, odds):
    """Draw one of the first `count` candidates of `legal` from softmax(logits).

    Args:
        odds: float64 [at least count], scratch.

    Returns:
        its number and the logarithm of its probability.
    """
    most = logits[legal[0]]
    for k in range(1, count):
        most = max(most, logits[legal[k]])
    total = 0.0
    for k in range(count):
        odds[k] = math.exp(logits[legal[k]] - most)
        total += odds[k]
    left = uniform(bits) * total
    chosen = legal[count - 1]  # where rounding leaves something over
    for k in range(count):
        left -= odds[k]
        if left < 0.0:
            chosen = legal[k]
            break
    return chosen, logits[chosen] - most - math.log(total)


@kernel
def _value(frame, net, scratch, l):
    return inlane.forward(net, scratch, frame, l)[1]


@inlined
def _record(lanes, net, scratch, steps, tally, t, b, l):
    """What the step that lane l has just made says: reward, time, ends."""
    out = lanes.out
    steps.rewards[t, b] = out.reward[l]
    steps.elapsed_s[t, b] = out.elapsed_s[l]
    steps.terminated[t, b], steps.truncated[t, b] = out.terminated[l], out.truncated[l]
    steps.next_values[t, b] = steps.returns[t, b] = steps.lengths[t, b] = 0
    tally.decisions[l] += 1
    tally.episode_return[l] += out.reward[l]
    tally.episode_length[l] += 1
    if not (out.terminated[l] or out.truncated[l]):
        return
    if not out.terminated[l]:
        steps.next_values[t, b] = _value(lanes.final, net, scratch, l)
    steps.returns[t, b], steps.lengths[t, b] = tally.episode_return[l], tally.episode_length[l]
    tally.episode_return[l] = tally.episode_length[l] = 0


@inlined
def _note(world, asked, l):
    """When lane l is asked next: its play and the time in it."""
    asked[l, 0], asked[l, 1] = world.lane[l].plays, world.lane[l].now


@inlined
def _furthest_behind(asked, first, last):
    """The lane of a group that is asked first: the earliest play, then time, then number."""
    found = first
    for l in range(first + 1, last):
        if asked[l, 0] < asked[found, 0] or (
            asked[l, 0] == asked[found, 0] and asked[l, 1] < asked[found, 1]
        ):
            found = l
    return found


@kernel
def _play_groups(lanes, net, store, steps, tally, seed, asked, scratch, first, last):
    """Play the groups of lanes first..last-1.

    Args:
        store: `Frame` with a row for each decision of the roll-out.
        asked: int64 [B, 2], scratch.
    """
    size, world, out = lanes.rules.group_size, lanes.world, lanes.out
    for start in range(first * size, last * size, size):
        for l in range(start, start + size):
            _note(world, asked, l)
        for k in range(steps.actions.shape[0] * size):
            t, b = k // size, start + k % size
            l = _furthest_behind(asked, start, start + size)
            lane = world.lane[l]
            copy_frame(lanes.frame, l, store, t * steps.actions.shape[1] + b)
            steps.lane[t, b], steps.plays[t, b], steps.now_s[t, b] = l, lane.plays, lane.now / PS
            count, value = inlane.forward(net, scratch, lanes.frame, l)
            bits = mix(mix(mix(seed, _DRAWS), l), tally.decisions[l])
            action, log_prob = draw(scratch.logits, scratch.legal, count, bits, scratch.odds)
            steps.actions[t, b], steps.log_probs[t, b], steps.values[t, b] = action, log_prob, value
            step_lane(world, lanes.frame, lanes.final, lanes.finished, out, lanes.rules, action, l)
            _record(lanes, net, scratch, steps, tally, t, b, l)
            _note(world, asked, l)
        for l in range(start, start + size):
            tally.last_values[l] = _value(lanes.frame, net, scratch, l)
