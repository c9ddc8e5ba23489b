"""The gradient of PPO's loss, computed decision by decision where the roll-out's memory lies.

On a CPU, torch spends most of an update on moving batches of small rows around; here a decision's forward and
backward pass stay in the processor's cache. `PPO._gradient` is the same in torch, for other devices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from servegym.agents.ppo.buffer import RolloutBuffer
from servegym.agents.ppo.config import PPOConfig
from servegym.envs.cluster.kernel import decorators
from servegym.envs.cluster.observe import Frame
from servegym.models import backward, inlane, simd
from servegym.models.config import NetworkConfig
from servegym.models.features import ARRAYS
from servegym.models.packing import (
    Scratch,
    Slopes,
    Weights,
    load_weights,
    make_scratch,
    make_slopes,
    make_weights,
    turn,
    unload_gradient,
)

kernel, inlined = decorators(simd.__file__, inlane.__file__, backward.__file__)
STATISTICS = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac")


class _Memory(NamedTuple):
    """What one thread computes in."""

    scratch: Scratch
    slopes: Slopes
    gradient: Weights


class KernelGradient:
    """Gradients of the clipped objective on the decisions in a buffer.

    Args:
        buffer: of the roll-outs.
        network: size of the network.
        config: hyperparameters.
    """

    def __init__(self, buffer: RolloutBuffer, network: NetworkConfig, config: PPOConfig) -> None:
        rows = {name: buffer.obs[name].reshape(-1, *buffer.obs[name].shape[2:]) for name in ARRAYS}
        self._frame = Frame(**rows, oracle=np.zeros((0, 0)))
        old = buffer.steps.actions, buffer.steps.log_probs, buffer.advantages, buffer.targets
        self._old = tuple(array.reshape(-1) for array in old)
        self._network = network
        self._rates = np.array([config.clip_range, config.value_coef, config.entropy_coef])
        self._weights = make_weights(network.hidden, network.layers)
        self._turned = turn(self._weights)
        self._free: list[_Memory] = []

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Compute from these weights, the network's `state_dict`, from now on."""
        load_weights(self._weights, {name: weight.numpy() for name, weight in weights.items()})
        self._turned = turn(self._weights)

    def __call__(self, numbers: Tensor, weight: float) -> tuple[dict[str, np.ndarray], Tensor]:
        """Gradient and `STATISTICS` of the mean loss on some decisions, times `weight`; from any thread.

        Args:
            numbers: of decisions in the buffer, int64 [N].

        Returns:
            the gradient by each tensor of `policy.safetensors`, and the statistics, float32 [5].
        """
        memory = self._free.pop() if self._free else self._allocate()
        for part in memory.gradient:
            part[...] = 0.0
        sums = np.zeros(len(STATISTICS))
        net = self._weights, self._turned
        _learn(*net, *memory, self._frame, *self._old, numbers.numpy(), weight, self._rates, sums)
        gradient = unload_gradient(memory.gradient, self._network.hidden)
        self._free.append(memory)
        return gradient, torch.from_numpy((weight / len(numbers) * sums).astype(np.float32))

    def _allocate(self) -> _Memory:
        frame = self._frame
        sizes = frame.instances.shape[1], frame.requests.shape[1], frame.mask.shape[1]
        scratch = make_scratch(self._weights, *sizes)
        return _Memory(
            scratch, make_slopes(scratch), make_weights(self._network.hidden, self._network.layers)
        )


@inlined
def _loss(s, d, count, value, action, log_prob, advantage, target, share, rates, sums):
    """The loss's derivatives by the logits, into d.logits, and by the value; adds up the statistics."""
    clip, value_coef, entropy_coef = rates[0], rates[1], rates[2]
    most = s.logits[s.legal[0]]
    for k in range(1, count):
        most = max(most, s.logits[s.legal[k]])
    total = 0.0
    for k in range(count):
        s.odds[k] = math.exp(s.logits[s.legal[k]] - most)
        total += s.odds[k]
    shift = most + math.log(total)
    entropy = 0.0
    for k in range(count):
        s.odds[k] /= total
        entropy -= s.odds[k] * (s.logits[s.legal[k]] - shift)
    log_ratio = s.logits[action] - shift - log_prob
    ratio = math.exp(log_ratio)
    clipped = min(max(ratio, 1.0 - clip), 1.0 + clip)
    gain = min(ratio * advantage, clipped * advantage)
    by_log_prob = -ratio * advantage if ratio * advantage <= clipped * advantage else 0.0
    for k in range(count):
        c, p = s.legal[k], s.odds[k]
        slope = (c == action) * by_log_prob - by_log_prob * p
        slope += entropy_coef * p * (s.logits[c] - shift + entropy)
        d.logits[c] = share * slope
    error = value - target
    sums[0] -= gain
    sums[1] += error * error
    sums[2] += entropy
    sums[3] += ratio - 1.0 - log_ratio  # http://joschu.net/blog/kl-approx.html
    sums[4] += abs(ratio - 1.0) > clip
    return np.float32(share * 2.0 * value_coef * error)


@kernel
def _learn(
    net, turned, s, d, grad, frame, actions, log_probs, advantages, targets, numbers, weight, rates, sums
):
    """Add the gradient of the mean loss on the decisions `numbers`, times weight; sum up the statistics."""
    share = weight / len(numbers)
    for n in numbers:
        count, value = inlane.forward(net, s, frame, n)
        slope = _loss(
            s, d, count, value, actions[n], log_probs[n], advantages[n], targets[n], share, rates, sums
        )
        backward.backward(net, turned, s, d, grad, frame, n, slope)
