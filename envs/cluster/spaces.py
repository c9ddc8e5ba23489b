"""The spaces of the observation contract."""

from __future__ import annotations

import numpy as np
from gymnasium import spaces

from servegym.envs.cluster import schema

_FLOAT = float(np.finfo(np.float32).max)
_PRIORITY = schema.column(schema.REQUEST, "priority")


def observation_space(instances: int, requests: int = 1, *, oracle: bool = False) -> spaces.Dict:
    """Space of one lane's observation for fleets of up to `instances`, with `requests` request rows.

    `schema` describes the arrays.

    Every feature is at least 0 but a request's priority, which may be any int16.
    """
    candidates = schema.most_candidates(instances, requests)
    lowest = np.zeros((requests, len(schema.REQUEST)), np.float32)
    lowest[:, _PRIORITY] = np.iinfo(np.int16).min
    parts: dict[str, spaces.Space] = {
        "instances": _positive(instances, len(schema.INSTANCE)),
        "requests": spaces.Box(lowest, np.full_like(lowest, _FLOAT), dtype=np.float32),
        "candidates": spaces.Box(-1, max(instances, requests) - 1, (candidates, 3), np.int32),
        "edges": _positive(candidates, len(schema.EDGE)),
        "globals": _positive(len(schema.GLOBAL)),
        "history": _positive(schema.HISTORY),
        "instance_mask": spaces.Box(0, 1, (instances,), np.int8),
        "mask": spaces.Box(0, 1, (candidates,), np.int8),
        "kind": spaces.Discrete(len(schema.KINDS)),
    }
    if oracle:
        parts["oracle"] = spaces.Box(0, _FLOAT, (candidates,), np.float64)
    return spaces.Dict(parts)


def _positive(*shape: int) -> spaces.Box:
    return spaces.Box(0, _FLOAT, shape, np.float32)
