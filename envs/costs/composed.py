"""Whole iterations against aiconfigurator's: an oracle that no profile is built from.

aiconfigurator (NVIDIA, Apache-2.0) composes iterations from the same kernels with rules of its own; the files
hold model, system, backend, tp, kind, batch, new_tokens, context, prefix and latency_ms.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from servegym.envs.costs.columns import read_csv
from servegym.envs.costs.fitting import relative_error
from servegym.envs.costs.profile import Error, Profile
from servegym.envs.costs.reference import ReferenceCosts
from servegym.envs.costs.tables import PS_PER_US, cost_tables

KINDS = ("decode", "prefill", "prefill_prefix")
MAX_TOKENS, MAX_SEQUENCES = 32768, 256


def composed_error(profile: Profile, path: str | Path, backend: str = "vllm") -> dict[str, Error]:
    """Error of whole iterations by kind; cells that exceed the profile's KV capacity are left out.

    Raises:
        InputError: unreadable, or a column that is missing or malformed.
    """
    numbers = ("tp", "batch", "new_tokens", "context", "prefix", "latency_ms")
    data = read_csv(Path(path), numbers, text=("backend", "kind"))
    tp, batch, new, context, prefix, ms = (data[name] for name in numbers)
    costs = ReferenceCosts(cost_tables([profile], MAX_TOKENS, MAX_SEQUENCES))
    usable = (data["backend"] == backend) & (tp == profile.tensor_parallel) & (batch <= MAX_SEQUENCES)
    usable &= (new <= MAX_TOKENS) & (batch * context <= profile.kv_tokens)
    errors = {}
    for kind in KINDS:
        rows = np.flatnonzero(usable & (data["kind"] == kind))
        ours = [
            _iteration(costs, kind, int(batch[i]), int(new[i]), int(context[i]), int(prefix[i])) for i in rows
        ]
        errors[f"composed_{kind}"] = relative_error(np.asarray(ours) / PS_PER_US / 1e3, ms[rows])
    return errors


def _iteration(costs: ReferenceCosts, kind: str, batch: int, new: int, context: int, prefix: int) -> int:
    if kind == "decode":
        return costs.iteration_ps(0, [context] * batch, [])
    return costs.iteration_ps(0, [], [(new // batch, prefix)] * batch)
