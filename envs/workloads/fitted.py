"""Open-loop requests with the arrival and the length model that were fitted to a public trace."""

from __future__ import annotations

import numpy as np

from servegym.envs.workloads.arrivals import gamma_arrivals, modulated_arrivals
from servegym.envs.workloads.fits import fit
from servegym.envs.workloads.lengths import sample_lengths
from servegym.envs.workloads.workload import Workload, make_workload

UNCLOCKED_RATE_RPS = 1.0  # for workloads whose source has no clock time, so no rate to fit


def fitted(name: str, requests: int, rate_rps: float, rng: np.random.Generator) -> Workload:
    """Requests like those of trace `name`; Poisson arrivals where the trace has no clock."""
    f = fit(name)
    arrivals, lengths = rng.spawn(2)
    if "arrival" in f:
        arrived = modulated_arrivals(arrivals, requests, f["arrival"]) * (fitted_rate_rps(name) / rate_rps)
    else:
        arrived = gamma_arrivals(arrivals, requests, rate_rps)
    prompt, output = sample_lengths(lengths, f["lengths"], requests)
    return make_workload(name, arrived, prompt, output, class_names=(f["class"],))


def fitted_rate_rps(name: str) -> float:
    """Mean rate of trace `name` in requests/s; 1 where it has no clock."""
    f = fit(name)
    return f["arrival"]["rate_rps"] if "arrival" in f else UNCLOCKED_RATE_RPS
