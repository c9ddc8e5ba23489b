"""Hand-made dispatch observations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest

from servegym.envs.cluster import schema

Observe = Callable[..., dict[str, np.ndarray]]


def _fill(rows: np.ndarray, table: tuple[schema.Feature, ...], values: Mapping[str, object]) -> None:
    for name, value in values.items():
        rows[..., schema.column(table, name)] = value


def observe(
    instances: Mapping[str, Sequence[float]],
    request: Mapping[str, float] | None = None,
    edges: Mapping[str, Sequence[float]] | None = None,
    overall: Mapping[str, float] | None = None,
    legal: Sequence[int] | None = None,
    oracle: Sequence[float] | None = None,
) -> dict[str, np.ndarray]:
    """One lane; features that are not named are 0, instances are legal unless `legal` says otherwise."""
    count = len(next(iter(instances.values())))
    obs = {
        "instances": np.zeros((1, count, len(schema.INSTANCE)), np.float32),
        "requests": np.zeros((1, 1, len(schema.REQUEST)), np.float32),
        "candidates": np.array([(0, max(k - 1, 0), -1) for k in range(count + 1)], np.int32)[None],
        "edges": np.zeros((1, count + 1, len(schema.EDGE)), np.float32),
        "globals": np.zeros((1, len(schema.GLOBAL)), np.float32),
        "history": np.zeros((1, schema.HISTORY), np.float32),
        "instance_mask": np.ones((1, count), np.int8),
        "mask": np.r_[1, [1] * count if legal is None else legal].astype(np.int8)[None],
        "kind": np.zeros(1, np.int64),
    }
    _fill(obs["instances"][0], schema.INSTANCE, instances)
    _fill(obs["requests"][0, 0], schema.REQUEST, request or {})
    _fill(obs["edges"][0, 1:], schema.EDGE, edges or {})
    _fill(obs["globals"][0], schema.GLOBAL, overall or {})
    if oracle is not None:
        obs["oracle"] = np.array([[0.0, *oracle]])
    return obs


@pytest.fixture(name="observe", scope="session")
def observe_fixture() -> Observe:
    return observe
