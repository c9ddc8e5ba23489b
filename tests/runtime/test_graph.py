"""The ONNX graph against the numpy form, for questions of any shape."""

import numpy as np
import onnxruntime
import pytest

from servegym.envs.cluster import schema
from servegym.models import numpy_policy
from servegym.models.config import NetworkConfig
from servegym.models.dense import DenseNetwork
from servegym.models.features import SCALE, WIDTH
from servegym.runtime.feed import REMEMBERED, Scorer
from servegym.runtime.graph import build_graph


def observation(instances: int, requests: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Any joins, illegal candidates and padded instances, as no environment makes them all at once."""
    size = schema.most_candidates(instances, requests)
    real = rng.random(instances) < 0.7
    real[0] = True
    candidates = np.stack([rng.integers(0, requests, size), rng.integers(0, instances, size)], 1)
    candidates[0, 1] = 0
    mask = (rng.random(size) < 0.7) & real[candidates[:, 1]]
    mask[0] = True
    shapes = {"instances": (1, instances), "requests": (1, requests), "edges": (1, size)}
    tables = {
        name: rng.gamma(1.0, 2.0, (*shapes.get(name, (1,)), n)) * SCALE[name] for name, n in WIDTH.items()
    }
    tables["globals"][0, schema.column(schema.GLOBAL, "instances")] = real.sum()
    tables["requests"][..., schema.column(schema.REQUEST, "priority")] -= 3.0
    return {
        **{name: table.astype(np.float32) for name, table in tables.items()},
        "candidates": np.pad(candidates, ((0, 0), (0, 1)), constant_values=-1)[None].astype(np.int32),
        "instance_mask": real[None].astype(np.int8),
        "mask": mask[None].astype(np.int8),
        "kind": rng.integers(0, len(schema.KINDS), 1),
    }


def network(hidden: int, layers: int) -> dict[str, np.ndarray]:
    """Fresh biases are 0 and fresh scores near uniform; neither would show a fault."""
    rng = np.random.default_rng(0)
    parameters = DenseNetwork(NetworkConfig(hidden, layers), seed=1).named_parameters()
    return {n: (p.detach().numpy() + rng.normal(0, 0.1, p.shape)).astype(np.float32) for n, p in parameters}


def scorer(weights: dict[str, np.ndarray], requests: int) -> Scorer:
    graph = build_graph(weights, requests).SerializeToString()
    return Scorer(onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"]))


def assert_same(found: Scorer, weights: dict[str, np.ndarray], obs: dict[str, np.ndarray]) -> None:
    legal, scores = found.score(obs)
    np.testing.assert_array_equal(legal, np.flatnonzero(obs["mask"]))
    expected = numpy_policy.forward(weights, obs)[0][0, legal]
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("requests", [1, schema.OFFERS])
@pytest.mark.parametrize(("hidden", "layers"), [(32, 2), (7, 1), (16, 3), (8, 0)])
def test_the_graph_is_the_network(hidden, layers, requests):
    weights, rng = network(hidden, layers), np.random.default_rng(0)
    found = scorer(weights, requests)
    for instances in (1, 2, 5, 16, 70):
        for _ in range(3):
            assert_same(found, weights, observation(instances, requests, rng))


def test_questions_take_turns():
    """What is remembered of one is not mistaken for another's, also when there are too many to remember."""
    weights, rng = network(8, 1), np.random.default_rng(0)
    found = scorer(weights, schema.OFFERS)
    asked = [observation(3, rows, rng) for rows in (1, 2, schema.OFFERS) for _ in range(REMEMBERED)]
    kinds = [{**obs, "kind": (obs["kind"] + 1) % len(schema.KINDS)} for obs in asked[:3]]
    for obs in [*asked[:3], *kinds, *asked, *asked[:3]]:
        assert_same(found, weights, obs)
        assert_same(found, weights, {**obs, "instances": 2 * obs["instances"]})


def test_numbers_that_are_none_reach_the_scores():
    found, rng = scorer(network(8, 1), 1), np.random.default_rng(0)
    for name in ("instances", "requests", "edges", "globals", "history"):
        obs = observation(4, 1, rng)
        obs["instance_mask"][:] = obs["mask"][:] = 1
        obs[name].reshape(-1)[2] = np.nan
        assert np.isnan(found.score(obs)[1]).any(), name
