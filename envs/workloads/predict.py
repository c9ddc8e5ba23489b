"""Output-length predictions: what a policy may know about a length that it must not see."""

from __future__ import annotations

import numpy as np

from servegym.envs.workloads.checks import MAX_TOKENS, check_whole
from servegym.envs.workloads.workload import Workload
from servegym.errors import InputError


def predicted_output_tokens(w: Workload, sigma: float, seed: int = 0) -> np.ndarray:
    """Predicted output tokens: the truth times exp(sigma * standard normal), rounded, at least 1.

    Args:
        w: the workload, N rows.
        sigma: standard deviation of the log error; 0 is the truth, 0.5 a typical learned predictor.
        seed: seed of the errors.

    Returns:
        int32 [N], in tokens.
    """
    if not 0 <= sigma <= 10:
        raise InputError(w.name, "sigma", sigma, "the standard deviation of the log error lies in 0..10")
    noise = np.random.default_rng(check_whole(w.name, "seed", seed, 0)).standard_normal(len(w))
    return np.clip(np.rint(w.output_tokens * np.exp(sigma * noise)), 1, MAX_TOKENS).astype(np.int32)
