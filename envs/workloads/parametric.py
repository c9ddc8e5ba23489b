"""Workloads whose parameters stand in their name."""

from __future__ import annotations

import re

import numpy as np

from servegym.envs.workloads.arrivals import gamma_arrivals
from servegym.envs.workloads.workload import Workload, make_workload
from servegym.errors import InputError

LLUMNIX_ALPHA = {128: 2.0, 256: 1.5, 512: 1.15, 1024: 1.0005}  # mean tokens -> exponent
LLUMNIX_MAX_TOKENS = 6144


def fixed(name: str, requests: int, rate_rps: float, rng: np.random.Generator) -> Workload:
    """`fixed:IN-OUT`: constant lengths, Poisson arrivals."""
    match = re.fullmatch(r"fixed:([1-9]\d{0,6})-([1-9]\d{0,6})", name)
    if match is None:
        raise InputError("workload", "name", name, "write fixed:IN-OUT in tokens, for example fixed:1024-256")
    prompt, output = (np.full(requests, int(tokens)) for tokens in match.groups())
    return make_workload(name, gamma_arrivals(rng, requests, rate_rps), prompt, output)


def llumnix(name: str, requests: int, rate_rps: float, rng: np.random.Generator) -> Workload:
    """`llumnix:IN-OUT` or `llumnix:IN-OUT:cvX`: power-law lengths, Poisson or gamma arrivals.

    As in the artifact of Llumnix (OSDI 2024, alibaba/llm-scheduling-artifact).
    """
    match = re.fullmatch(r"llumnix:(\d+)-(\d+)(?::cv(\d+(?:\.\d+)?))?", name)
    means = [int(mean) for mean in match.groups()[:2]] if match else []
    cv = float(match[3] or 1) if match else 0.0
    if not means or not set(means) <= set(LLUMNIX_ALPHA) or cv <= 0:
        raise InputError(
            "workload",
            "name",
            name,
            f"write llumnix:IN-OUT[:cvX] with means from {', '.join(map(str, LLUMNIX_ALPHA))}",
        )
    arrivals, lengths = rng.spawn(2)
    prompt, output = (_power_law(lengths, requests, mean) for mean in means)
    return make_workload(name, gamma_arrivals(arrivals, requests, rate_rps, cv), prompt, output)


def _power_law(rng: np.random.Generator, count: int, mean: int) -> np.ndarray:
    """Ranks 1..2 * mean - 1 with probability ~ rank^-alpha, scaled to the mean, rounded up and capped."""
    ranks = np.arange(1, 2 * mean)
    weight = ranks ** -LLUMNIX_ALPHA[mean]
    cdf = np.cumsum(weight) / weight.sum()
    scale = mean / (ranks @ weight / weight.sum())
    values = np.minimum(np.ceil(ranks * scale), LLUMNIX_MAX_TOKENS).astype(np.int64)
    return values[np.minimum(np.searchsorted(cdf, rng.random(count)), len(values) - 1)]
