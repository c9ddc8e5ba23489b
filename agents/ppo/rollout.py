"""Roll-outs inside the lanes: observe, decide, step, all in one kernel call a thread.

Neither Python nor torch is in the loop, and the lanes are played one after the other, so that a lane's state
stays in the cache for all its steps. What is drawn depends on seed, lane and step only: results do not depend
on the number of threads, and a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from servegym.envs.cluster.crew import Crew
from servegym.envs.cluster.kernel import decorators
from servegym.envs.cluster.observe import Frame
from servegym.envs.cluster.scrape import mix, uniform
from servegym.envs.cluster.state import PS
from servegym.envs.cluster.steps import step_lane
from servegym.envs.cluster.vector import DispatchVectorEnv
from servegym.models import inlane, simd
from servegym.models.config import NetworkConfig
from servegym.models.features import ARRAYS

kernel, inlined = decorators(simd.__file__, inlane.__file__)
_DRAWS = 0x0D15EA5E  # sets the stream of draws apart from those of episodes and scrapes with the same seed


class Steps(NamedTuple):
    """T decisions of B lanes; arrays [T, B].

    `values` and `next_values` are in the units of the trainer's normaliser; next_values is that of the final
    observation where an episode was truncated and 0 elsewhere. `now_s` is the simulated time of the decision in
    the lane's `plays`-th episode. `returns` and `lengths` are those of the episodes that ended there, 0 elsewhere.
    """

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

    episode_return: np.ndarray  # float64; of the episode in progress
    episode_length: np.ndarray  # int64
    last_values: np.ndarray  # float32; of the question that is open now, in the normaliser's units


def make_steps(steps: int, lanes: int) -> Steps:
    """Zeroed memory of a roll-out."""
    kinds = {"actions": np.int64, "plays": np.int64, "lengths": np.int64, "terminated": bool, "truncated": bool}
    kinds |= dict.fromkeys(("log_probs", "values", "next_values"), np.float32)
    return Steps(**{name: np.zeros((steps, lanes), kinds.get(name, np.float64)) for name in Steps._fields})


def make_tally(lanes: int) -> Tally:
    """Episodes that begin."""
    return Tally(np.zeros(lanes), np.zeros(lanes, np.int64), np.zeros(lanes, np.float32))


class Collector:
    """Plays the lanes of an environment with a network, on its own threads.

    Args:
        env: has been reset.
        network: size of the network.
        num_threads: threads that share the lanes.
        seed: of the draws.
    """

    def __init__(self, env: DispatchVectorEnv, network: NetworkConfig, num_threads: int, seed: int) -> None:
        self._lanes, self._seed = env.lanes(), seed
        self._weights = inlane.make_weights(network.hidden, network.layers)
        frame = self._lanes.frame
        sizes = (frame.instances.shape[1], frame.requests.shape[1], frame.mask.shape[1])
        bounds = np.linspace(0, env.num_envs, min(num_threads, env.num_envs) + 1).astype(int).tolist()
        self._crew = Crew(
            [(inlane.make_scratch(self._weights, *sizes), first, last) for first, last in pairwise(bounds)]
        )

    def run(
        self,
        weights: Mapping[str, np.ndarray],
        obs: Mapping[str, np.ndarray],
        steps: Steps,
        tally: Tally,
        first_step: int,
    ) -> None:
        """Play T decisions in every lane.

        Args:
            weights: of the network, as in `policy.safetensors`.
            obs: receives the observations, [T, B, ...] by name.
            steps: receives the rest.
            tally: is read and brought up to date.
            first_step: decisions of each lane before these, over the whole training.
        """
        inlane.load_weights(self._weights, weights)
        store = Frame(**{name: obs[name] for name in ARRAYS}, oracle=self._lanes.frame.oracle)
        self._crew.run(
            _play_lanes, self._lanes, self._weights, store, steps, tally, np.uint64(self._seed), first_step
        )

    def close(self) -> None:
        """End the threads."""
        self._crew.close()


@inlined
def _keep(frame, l, store, t):
    """Copy a lane's question into the roll-out."""
    _copy(frame.instances[l].reshape(-1), store.instances[t, l].reshape(-1))
    _copy(frame.requests[l].reshape(-1), store.requests[t, l].reshape(-1))
    _copy(frame.candidates[l].reshape(-1), store.candidates[t, l].reshape(-1))
    _copy(frame.edges[l].reshape(-1), store.edges[t, l].reshape(-1))
    _copy(frame.globals[l], store.globals[t, l])
    _copy(frame.history[l], store.history[t, l])
    _copy(frame.instance_mask[l], store.instance_mask[t, l])
    _copy(frame.mask[l], store.mask[t, l])
    store.kind[t, l] = frame.kind[l]


@inlined
def _copy(source, target):
    for k in range(len(source)):
        target[k] = source[k]


@inlined
def draw(logits, legal, count, bits):
    """Draw one of the first `count` candidates of `legal` from softmax(logits).

    Returns:
        its number and the logarithm of its probability.
    """
    most = logits[legal[0]]
    for k in range(1, count):
        most = max(most, logits[legal[k]])
    total = 0.0
    for k in range(count):
        total += math.exp(logits[legal[k]] - most)
    left = uniform(bits) * total
    chosen = legal[count - 1]  # where rounding leaves something over
    for k in range(count):
        left -= math.exp(logits[legal[k]] - most)
        if left < 0.0:
            chosen = legal[k]
            break
    return chosen, logits[chosen] - most - math.log(total)


@kernel
def _final_value(lanes, net, scratch, l):
    return inlane.forward(net, scratch, lanes.final, l)[1]


@inlined
def _record(lanes, net, scratch, steps, tally, t, l):
    """What the step that lane l has just made says: reward, time, ends."""
    out = lanes.out
    steps.rewards[t, l] = out.reward[l]
    steps.elapsed_s[t, l] = out.elapsed_s[l]
    steps.terminated[t, l], steps.truncated[t, l] = out.terminated[l], out.truncated[l]
    steps.next_values[t, l] = steps.returns[t, l] = steps.lengths[t, l] = 0
    tally.episode_return[l] += out.reward[l]
    tally.episode_length[l] += 1
    if not (out.terminated[l] or out.truncated[l]):
        return
    if out.truncated[l] and not out.terminated[l]:
        steps.next_values[t, l] = _final_value(lanes, net, scratch, l)
    steps.returns[t, l], steps.lengths[t, l] = tally.episode_return[l], tally.episode_length[l]
    tally.episode_return[l] = tally.episode_length[l] = 0


@kernel
def _play_lanes(lanes, net, store, steps, tally, seed, first_step, scratch, first, last):
    """Play lanes first..last-1."""
    for l in range(first, last):
        stream = mix(mix(seed, _DRAWS), l)
        lane = lanes.world.lane[l]
        n_steps = steps.actions.shape[0]
        for t in range(n_steps + 1):
            count, value = inlane.forward(net, scratch, lanes.frame, l)
            if t == n_steps:
                tally.last_values[l] = value
                break
            _keep(lanes.frame, l, store, t)
            action, log_prob = draw(scratch.logits, scratch.legal, count, mix(stream, first_step + t))
            steps.actions[t, l], steps.log_probs[t, l], steps.values[t, l] = action, log_prob, value
            steps.now_s[t, l], steps.plays[t, l] = lane.now / PS, lane.plays
            step_lane(
                lanes.world, lanes.frame, lanes.final, lanes.finished, lanes.out, lanes.rules, action, l
            )
            _record(lanes, net, scratch, steps, tally, t, l)
