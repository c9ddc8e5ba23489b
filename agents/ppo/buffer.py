"""What a roll-out leaves behind, and what it says about each decision's advantage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import gymnasium
import numpy as np
import torch
from torch import Tensor

from servegym.models.features import ARRAYS


def gae(
    rewards: np.ndarray,
    values: np.ndarray,
    next_values: np.ndarray,
    elapsed_s: np.ndarray,
    ends: np.ndarray,
    beta: float,
    horizon_s: float,
) -> np.ndarray:
    """Generalised advantage estimation (arXiv 1506.02438) for a semi-Markov process.

    With decision t at s_t, tau_t seconds before the next one, and V the value function:

        d_t     = exp(-beta tau_t),  l_t = exp(-tau_t / horizon)
        delta_t = r_t (1 - d_t) / (beta tau_t) + d_t V(s_t+1) - V(s_t)
        A_t     = delta_t + d_t l_t A_t+1           (without the second term where an episode ends)

    The reward accrues over the transition, here taken to be even: the factor is the mean of exp(-beta s) over
    it, which matters for the long drain after the last decision of an episode. Lambda is a function of time
    like the discount: a lambda per decision would look further ahead on a small fleet than on a large one,
    where decisions follow each other faster.

    Args:
        rewards: r, float64 [T, B].
        values: V(s_t), [T, B].
        next_values: V(s_t+1), [T, B]: of the final observation where an episode was truncated, 0 where it
            terminated.
        elapsed_s: tau, [T, B].
        ends: bool [T, B], where an episode ended either way.
        beta: discount rate, 1/s.
        horizon_s: seconds over which returns are trusted before the value function; inf is lambda 1.

    Returns:
        Advantages float64 [T, B]; the return that a value function learns is `values` + them.
    """
    rate = beta * elapsed_s
    mean_discount = np.divide(-np.expm1(-rate), rate, out=np.ones_like(rate), where=rate > 0)
    deltas = rewards * mean_discount + np.exp(-rate) * next_values - values
    carry = np.exp(-(beta + 1.0 / horizon_s) * elapsed_s) * ~ends
    advantages = np.empty_like(deltas)
    ahead = np.zeros(deltas.shape[1])
    for t in reversed(range(len(deltas))):
        ahead = advantages[t] = deltas[t] + carry[t] * ahead
    return advantages


def group_relative(advantages: np.ndarray, group_size: int) -> np.ndarray:
    """Take from each advantage the mean over the lanes that meet the same arrivals.

    The lanes of a group play one episode side by side: decision k is about the same request at the same time
    in all of them. What the coming arrivals do to the return is common to them and cancels; what is left is
    the lane's own doing. This is an input-driven baseline (arXiv 1807.02264) that needs no training. Turns of
    closed-loop sessions arrive when the lane's own answers are done; there the baseline is only a rough one.

    Args:
        advantages: [T, B], lanes of a group next to each other.
        group_size: 1 leaves the advantages as they are.

    Returns:
        Advantages [T, B].
    """
    if group_size == 1:
        return advantages
    grouped = advantages.reshape(len(advantages), -1, group_size)
    return (grouped - grouped.mean(-1, keepdims=True)).reshape(advantages.shape)


class ReturnNormalizer:
    """Running mean and standard deviation of returns, so that the value head learns numbers around 1.

    Means over roll-outs are plain for the first twenty and exponential with weight 1/20 after, since
    returns change with the policy.
    """

    def __init__(self) -> None:
        self.mean, self.square, self.count = 0.0, 1.0, 0

    @property
    def std(self) -> float:
        """Standard deviation, 1 before the first update."""
        return max(self.square - self.mean**2, 1e-12) ** 0.5

    def update(self, returns: np.ndarray) -> None:
        """Take in the returns of one roll-out."""
        self.count += 1
        weight = max(1.0 / self.count, 0.05)
        self.mean += weight * (float(returns.mean()) - self.mean)
        self.square += weight * (float((returns**2).mean()) - self.square)

    def state(self) -> np.ndarray:
        """float64 [3], for `load`."""
        return np.array([self.mean, self.square, self.count])

    def load(self, state: np.ndarray) -> None:
        """Continue from a saved state."""
        self.mean, self.square, self.count = float(state[0]), float(state[1]), int(state[2])


class RolloutBuffer:
    """T decisions of B lanes, allocated once; torch reads the memory that numpy writes.

    Args:
        steps: T.
        lanes: B.
        space: the observation space of one lane.
    """

    def __init__(self, steps: int, lanes: int, space: gymnasium.spaces.Dict) -> None:
        self.steps, self.lanes = steps, lanes
        self.obs: dict[str, np.ndarray] = {}
        for name in ARRAYS:
            self.obs[name] = np.zeros((steps, lanes, *(space[name].shape or ())), space[name].dtype)
        self.actions = np.zeros((steps, lanes), np.int64)
        self.log_probs = np.zeros((steps, lanes), np.float32)
        self.rewards, self.values, self.next_values, self.elapsed_s = np.zeros((4, steps, lanes))
        self.ends = np.zeros((steps, lanes), bool)
        self.advantages, self.targets = np.zeros((2, steps, lanes), np.float32)

    @property
    def nbytes(self) -> int:
        """Memory of the buffer."""
        return sum(a.nbytes for a in [*self.obs.values(), *vars(self).values()] if isinstance(a, np.ndarray))

    def put(self, step: int, obs: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        """Copy a batch of observations in, and return the copy as tensors."""
        for name, rows in self.obs.items():
            rows[step] = obs[name]
        return {name: torch.from_numpy(rows[step]) for name, rows in self.obs.items()}

    def minibatches(self, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """The numbers of all decisions in random order, int64 [at most size] each."""
        yield from torch.randperm(self.steps * self.lanes, generator=generator).split(size)

    def rows(self, numbers: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Observations, and actions, log_probs, advantages and targets, of these decisions."""
        other = {name: getattr(self, name) for name in ("actions", "log_probs", "advantages", "targets")}
        return _take(self.obs, numbers), _take(other, numbers)


def _take(arrays: Mapping[str, np.ndarray], numbers: Tensor) -> dict[str, Tensor]:
    return {name: torch.from_numpy(a).flatten(0, 1).index_select(0, numbers) for name, a in arrays.items()}
