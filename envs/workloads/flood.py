"""Tenant flood: the traffic of many tenants, and for a while one more that sends more than all of them."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from servegym.envs.workloads.fits import fit
from servegym.envs.workloads.fitted import fitted
from servegym.envs.workloads.lengths import sample_lengths
from servegym.envs.workloads.workload import Workload, make_workload
from servegym.errors import InputError

SOURCES = ("azure2023_conv", "azure2023_code", "servegen_general", "servegen_reason", "arxiv_summarization")
FLOOD_TENANT = 0
TENANTS = 16  # of the steady traffic, 1..TENANTS; the k-th sends 1 / k as much as the first
DURATION = 0.2  # of the flood, as a fraction of the window
STARTS = (0.2, 0.5)  # earliest and latest start of the flood, likewise
MOST_TIMES = 1000.0


def flood(name: str, requests: int, rate_rps: float, rng: np.random.Generator) -> Workload:
    """`flood:STEADY+FLOOD:xTIMES`: tenants 1..16 send STEADY, and tenant 0 a burst of FLOOD.

    STEADY and FLOOD are fitted open-loop generators. For a fifth of the window, from a uniformly drawn moment
    in 20% to 50% of it on, the flood adds TIMES as many requests a second as the steady traffic has: Poisson
    arrivals, lengths of FLOOD, class `flood`. `rate_rps` is the mean rate of both together, so the steady
    traffic has rate_rps / (1 + 0.2 * TIMES).
    """
    steady_name, flood_name, times = _parse(name)
    steady_rng, tenant_rng, time_rng, length_rng = rng.spawn(4)
    extra = DURATION * times
    flooding = min(round(requests * extra / (1 + extra)), requests - 1)
    steady = fitted(steady_name, requests - flooding, rate_rps / (1 + extra), steady_rng)
    span_s = float(steady.arrived_at_s[-1])
    start = time_rng.uniform(*STARTS) + DURATION * np.sort(time_rng.random(flooding))
    lengths = sample_lengths(length_rng, fit(flood_name)["lengths"], flooding)
    tenant = tenant_rng.choice(np.arange(1, TENANTS + 1), len(steady), p=_shares())
    return _merged(replace(steady, name=name, tenant=tenant), start * span_s, *lengths)


def _parse(name: str) -> tuple[str, str, float]:
    """(steady generator, generator of the flood's lengths, flood's rate by the steady rate)."""
    match = re.fullmatch(r"flood:(\w+)\+(\w+):x(\d+(?:\.\d+)?)", name)
    known = match is not None and match[1] in SOURCES and match[2] in SOURCES
    if match is None or not known or not 0 < float(match[3]) <= MOST_TIMES:
        hint = f"write flood:STEADY+FLOOD:xTIMES, both of {', '.join(SOURCES)}, TIMES in 0..{MOST_TIMES:g}"
        raise InputError("workload", "name", name, hint)
    return match[1], match[2], float(match[3])


def _shares() -> np.ndarray:
    """Fraction of the steady requests that each tenant sends, [TENANTS]."""
    weight = 1 / np.arange(1, TENANTS + 1)
    return weight / weight.sum()


def _merged(steady: Workload, arrived_s: np.ndarray, prompt: np.ndarray, output: np.ndarray) -> Workload:
    """Steady requests and those of the flood [F], by arrival."""
    arrived = np.concatenate([steady.arrived_at_s, arrived_s])
    order = np.argsort(arrived, kind="stable")
    is_flood = order >= len(steady)
    return make_workload(
        steady.name,
        arrived[order],
        np.concatenate([steady.prompt_tokens, prompt])[order],
        np.concatenate([steady.output_tokens, output])[order],
        class_id=is_flood.astype(np.int16),
        tenant=np.concatenate([steady.tenant, np.full(len(prompt), FLOOD_TENANT)])[order],
        class_names=(*steady.class_names, "flood"),
    )
