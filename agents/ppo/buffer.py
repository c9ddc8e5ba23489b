"""What a roll-out leaves behind, and the scale of its returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import gymnasium
import numpy as np
import torch
from torch import Tensor

from servegym.agents.ppo.rollout import make_steps
from servegym.models.features import ARRAYS


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
    """T decisions of B lanes, allocated once; torch reads the memory that the kernels write.

    Args:
        steps: T.
        lanes: B.
        space: the observation space of one lane.
    """

    def __init__(self, steps: int, lanes: int, space: gymnasium.spaces.Dict) -> None:
        self.obs: dict[str, np.ndarray] = {}
        for name in ARRAYS:
            self.obs[name] = np.zeros((steps, lanes, *(space[name].shape or ())), space[name].dtype)
        self.steps = make_steps(steps, lanes)
        self.advantages, self.targets = np.zeros((2, steps, lanes), np.float32)

    @property
    def nbytes(self) -> int:
        """Memory of the buffer."""
        return sum(a.nbytes for a in (*self.obs.values(), *self.steps, self.advantages, self.targets))

    def minibatches(self, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """The numbers of all decisions in random order, int64 [at most size] each."""
        yield from torch.randperm(self.advantages.size, generator=generator).split(size)

    def rows(self, numbers: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Observations, and actions, log_probs, advantages and targets, of these decisions."""
        other = {name: getattr(self.steps, name) for name in ("actions", "log_probs")}
        other |= {name: getattr(self, name) for name in ("advantages", "targets")}
        return take(self.obs, numbers), take(other, numbers)


def take(arrays: Mapping[str, np.ndarray], numbers: Tensor) -> dict[str, Tensor]:
    """Rows [N, ...] of arrays [T, B, ...] by their numbers in [T B]."""
    return {name: torch.from_numpy(a).flatten(0, 1).index_select(0, numbers) for name, a in arrays.items()}
