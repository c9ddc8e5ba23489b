"""The gradient of a loss, computed decision by decision where the roll-out's memory lies.

On a CPU, torch spends most of an update on moving batches of small rows around; here a decision's forward and
backward pass stay in the processor's cache. `PPO` and `imitation` have the same in torch, for other devices.
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
    """Gradients of PPO's clipped objective, or of imitation, on the decisions in a buffer.

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

    def __call__(
        self, numbers: Tensor, weight: float, imitate: bool = False
    ) -> tuple[dict[str, np.ndarray], Tensor]:
        """Gradient and `STATISTICS` of the mean loss on some decisions, times `weight`; from any thread.

        Args:
            numbers: of decisions in the buffer, int64 [N].
            imitate: the policy's loss is the cross-entropy of the buffer's answers, without entropy's bonus;
                the statistics then have only the value's loss and the entropy.

        Returns:
            the gradient by each tensor of `policy.safetensors`, and the statistics, float32 [5].
        """
        try:
            memory = self._free.pop()
        except IndexError:  # asked for, not looked for: another thread may take the last one in between
            memory = self._allocate()
        for part in memory.gradient:
            part[...] = 0.0
        sums = np.zeros(len(STATISTICS))
        net = self._weights, self._turned
        _learn(*net, *memory, self._frame, *self._old, numbers.numpy(), weight, self._rates, imitate, sums)
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
def _entropy(s, count):
    """Let `s.odds` be the probabilities of the legal candidates.

    Returns:
        their entropy, and what log-probabilities lack to be logits.
    """
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
    return entropy, shift


@inlined
def _by_log_prob(log_ratio, advantage, clip, sums):
    """The derivative of PPO's loss by the answer's log-probability; adds up what is said of the policy."""
    ratio = math.exp(log_ratio)
    clipped = min(max(ratio, 1.0 - clip), 1.0 + clip)
    gain, bound = ratio * advantage, clipped * advantage
    sums[0] -= min(gain, bound)
    sums[3] += ratio - 1.0 - log_ratio  # http://joschu.net/blog/kl-approx.html
    sums[4] += abs(ratio - 1.0) > clip
    return -gain if gain <= bound else 0.0


@kernel
def _learn(
    net, turned, s, d, grad, frame, actions, log_probs, advantages, targets, numbers, weight, rates, imitate,
    sums,
):  # fmt: skip
    """Add the gradient of the mean loss on the decisions `numbers`, times weight; sum up the statistics."""
    share, clip, value_coef, entropy_coef = weight / len(numbers), rates[0], rates[1], rates[2]
    for n in numbers:
        count, value = inlane.forward(net, s, frame, n)
        entropy, shift = _entropy(s, count)
        by_log_prob, by_entropy = -1.0, 0.0
        if not imitate:
            log_ratio = s.logits[actions[n]] - shift - log_probs[n]
            by_log_prob, by_entropy = _by_log_prob(log_ratio, advantages[n], clip, sums), -entropy_coef
        for k in range(count):
            c, p = s.legal[k], s.odds[k]
            slope = by_log_prob * ((c == actions[n]) - p) - by_entropy * p * (s.logits[c] - shift + entropy)
            d.logits[c] = share * slope
        error = value - targets[n]
        sums[1] += error * error
        sums[2] += entropy
        backward.backward(net, turned, s, d, grad, frame, n, np.float32(share * 2.0 * value_coef * error))
