"""Hyperparameters of PPO."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from servegym.errors import InputError


@dataclass(frozen=True)
class PPOConfig:
    """How PPO collects and learns; the defaults suit 128 lanes of 4 to 16 instances in groups of 16."""

    n_steps: int = 256
    """Decisions of each lane between two updates."""
    batch_size: int = 2048
    """Decisions of a minibatch."""
    n_epochs: int = 2
    """Passes over a roll-out; the model of the cluster is so fast that fresh decisions beat old ones."""
    learning_rate: float = 1e-3
    """Step size of Adam at the start."""
    anneal: bool = True
    """Let the step size fall linearly to 0 at the last decision."""
    beta: float = 0.1
    """Discount rate, 1/s: a reward t seconds ahead counts exp(-beta t).

    Scenarios say theirs. A decision matters for about as long as its request runs; a much longer horizon
    buries it under what arrives meanwhile.
    """
    gae_horizon_s: float = 3.0
    """Horizon of generalised advantage estimation, seconds: lambda = exp(-elapsed / horizon)."""
    clip_range: float = 0.2
    """Bound on the change of the probability ratio."""
    entropy_coef: float = 0.002
    """Weight of the entropy bonus."""
    value_coef: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 0.5
    """Bound on the gradient's norm."""
    target_kl: float = 0.03
    """No further epoch once the approximate KL divergence of one exceeds this; 0 never stops."""
    num_threads: int = 2
    """Threads of an update, each with a share of every minibatch; part of the result's bits."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value: Any = getattr(self, field.name)
            kinds = {"int": int, "float": (int, float), "bool": bool}[str(field.type)]
            typed = isinstance(value, kinds) and isinstance(value, bool) == (field.type == "bool")  # type: ignore
            if not typed:
                raise InputError("ppo", field.name, value, f"give a value of type {field.type}")
            low, high = _RANGES.get(field.name, (0.0, math.inf))
            if not low <= value <= high:
                raise InputError("ppo", field.name, value, f"give a value from {low} to {high}")


_RANGES: dict[str, tuple[float, float]] = {
    "n_steps": (1, 1_000_000),
    "batch_size": (1, 100_000_000),
    "n_epochs": (1, 1000),
    "num_threads": (1, 1024),
    "learning_rate": (0.0, 1.0),
    "gae_horizon_s": (1e-6, math.inf),
}
