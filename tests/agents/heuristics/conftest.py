"""Hand-made observations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest

from servegym.envs.cluster import schema
from servegym.envs.cluster.observe import make_frame

Observe = Callable[..., dict[str, np.ndarray]]
Values = Mapping[str, object]


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


def ask(
    kind: str,
    edges: Mapping[int, Values],
    requests: Values | None = None,
    instances: Values | None = None,
    pairs: Mapping[int, Sequence[int]] | None = None,
    oracle: Mapping[int, float] | None = None,
    count: int = 4,
) -> dict[str, np.ndarray]:
    """One lane with a question of another kind than dispatch; features that are not named are 0.

    Candidates named in `edges` are legal. Candidates 1 + 2 row and 2 + 2 row stand for a row of `preempt`,
    1 + row for one of `move`; `pairs` gives (row, destination, source) for `migrate`; `budget` has row 0.
    """
    frame = make_frame(1, count, schema.OFFERS, oracle=oracle is not None)
    frame.kind[0] = schema.KINDS.index(kind)
    frame.instance_mask[:] = 1
    frame.mask[0, [0, *edges]] = 1
    frame.candidates[0] = (0, 0, -1)
    for k, values in edges.items():
        rows = {"preempt": (k - 1) // 2, "move": k - 1, "budget": 0}
        frame.candidates[0, k] = pairs[k] if pairs else (rows[kind], 0, -1)
        _fill(frame.edges[0, k], schema.EDGE, values)
    for table, rows, values in (
        (schema.REQUEST, frame.requests[0], requests),
        (schema.INSTANCE, frame.instances[0], instances),
    ):
        for name, column in (values or {}).items():
            rows[: np.size(column), schema.column(table, name)] = column
    for k, value in (oracle or {}).items():
        frame.oracle[0, k] = value
    obs = frame._asdict()
    if oracle is None:
        del obs["oracle"]
    return obs


@pytest.fixture(name="ask", scope="session")
def ask_fixture() -> Observe:
    return ask
