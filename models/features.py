"""From natural units to what a network sees: constants for every form, and the numpy form.

A feature becomes log1p(x / scale) or x / scale, as its entry in `servegym.envs.cluster.schema` says.
Three globals and the history are totals over the cluster. They are divided by the number of instances n
first, and n itself enters as log1p(scale / n), so that a cluster of 64 looks much like one of 16
and a policy can be trained on small clusters and play on large ones.
"""

from __future__ import annotations

import numpy as np

from servegym.envs.cluster import schema

# The arrays that a network reads; others in an observation, such as `oracle`, are not for it.
ARRAYS = (
    "instances",
    "requests",
    "candidates",
    "edges",
    "globals",
    "history",
    "instance_mask",
    "mask",
    "kind",
)
TABLES = {
    "instances": schema.INSTANCE,
    "requests": schema.REQUEST,
    "edges": schema.EDGE,
    "globals": schema.GLOBAL,
    "history": (schema.HISTORY_FEATURE,) * schema.HISTORY,
}
WIDTH = {name: len(table) for name, table in TABLES.items()}
SCALE = {name: np.array([f.scale for f in table], np.float32) for name, table in TABLES.items()}
IS_LOG = {name: np.array([f.transform == "log" for f in table]) for name, table in TABLES.items()}

COUNT = schema.column(schema.GLOBAL, "instances")
IS_TOTAL = np.array([f.name in ("arrival_rate", "arrival_prompt_tokens", "inflight") for f in schema.GLOBAL])

# An illegal candidate's logit: its probability is exactly 0 in float32, and nothing becomes infinite.
ILLEGAL = -1.0e9


def scale(name: str, values: np.ndarray) -> np.ndarray:
    """Scale an array [..., WIDTH[name]] of the observation to float32 of the same shape."""
    scaled = np.asarray(values / SCALE[name], np.float32)
    return np.log1p(scaled, out=scaled, where=np.broadcast_to(IS_LOG[name], scaled.shape))


def scale_context(globals_: np.ndarray, history: np.ndarray) -> np.ndarray:
    """Globals and history, per instance and scaled, as one float32 [B, GLOBAL + HISTORY]."""
    count = np.maximum(globals_[:, COUNT, None], 1.0)
    shared = np.where(IS_TOTAL, globals_ / count, globals_)
    shared[:, COUNT] = SCALE["globals"][COUNT] ** 2 / count[:, 0]
    return np.concatenate([scale("globals", shared), scale("history", history / count)], axis=1)
