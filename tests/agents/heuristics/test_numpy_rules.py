"""Dispatch rules in numpy answer as the model's kernels of the same names do, ties included."""

import numpy as np
import pytest

from servegym.agents.heuristics import HEURISTICS, make_heuristic
from servegym.agents.heuristics._builtin import BuiltIn
from servegym.envs.cluster import rules, schema
from servegym.envs.cluster.observe import make_frame

LANES, INSTANCES = 400, 6
DISPATCH = [n for n, rule in HEURISTICS.items() if issubclass(rule, BuiltIn) and rule.kinds == ("dispatch",)]


def frames(requests: int):
    """Small whole numbers, so that costs tie; idle, padded and illegal instances among them."""
    rng, frame = np.random.default_rng(0), make_frame(LANES, INSTANCES, requests)
    for table in (frame.instances, frame.edges, frame.requests):
        table[:] = rng.integers(0, 4, table.shape)
    usage = schema.column(schema.INSTANCE, "kv_usage")
    frame.instances[:, :, usage] = rng.integers(0, 3, (LANES, INSTANCES)) / 2
    capacity = schema.column(schema.INSTANCE, "kv_capacity_tokens")
    frame.instances[:, :, capacity] = rng.integers(1, 3, (LANES, INSTANCES)) * 2048
    frame.instances[:, -1] = 0.0
    frame.mask[:, 0] = 1
    frame.mask[:, 1:INSTANCES] = rng.random((LANES, INSTANCES - 1)) < 0.7
    frame.kind[::7] = schema.KINDS.index("preempt")
    return frame


@pytest.mark.parametrize("requests", [1, schema.OFFERS])
@pytest.mark.parametrize("name", DISPATCH)
def test_numpy_and_kernel_choose_alike(name, requests):
    frame, rule = frames(requests), make_heuristic(name)
    rule.reset(LANES, 0)
    found = rule.act(frame._asdict())
    expected = np.empty(LANES, np.int64)
    dispatch, index = schema.KINDS.index("dispatch"), rules.RULES["dispatch"].index(rule.rule)
    rules.answer_lanes(frame, dispatch, index, rule.row(), expected)
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(found)) >= INSTANCES - 1


def test_there_are_seven():
    assert len(DISPATCH) == 7
