"""The ONNX graph against the numpy form, for questions of any shape."""

import numpy as np
import onnxruntime
import pytest

from servegym.envs.cluster import schema
from servegym.models import numpy_policy
from servegym.models.config import NetworkConfig
from servegym.models.dense import DenseNetwork
from servegym.runtime.graph import build_graph

UNBATCHED = ("instances", "requests", "candidates", "edges", "instance_mask", "mask")


def observation(instances: int, requests: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Any joins, illegal candidates and padded instances, as no environment makes them all at once."""
    size = schema.most_candidates(instances, requests)
    candidates = np.stack([rng.integers(0, requests, size), rng.integers(0, instances, size)], 1)
    mask, real = rng.random(size) < 0.7, rng.random(instances) < 0.7
    mask[0] = real[0] = True
    totals = rng.gamma(1.0, 20.0, (1, len(schema.GLOBAL)))
    totals[0, 0] = real.sum()
    return {
        "instances": rng.gamma(1.0, 50.0, (1, instances, len(schema.INSTANCE))).astype(np.float32),
        "requests": rng.gamma(1.0, 200.0, (1, requests, len(schema.REQUEST))).astype(np.float32),
        "candidates": np.pad(candidates, ((0, 0), (0, 1)), constant_values=-1)[None].astype(np.int32),
        "edges": rng.gamma(1.0, 1.0, (1, size, len(schema.EDGE))).astype(np.float32),
        "globals": totals.astype(np.float32),
        "history": rng.poisson(4.0, (1, schema.HISTORY)).astype(np.float32),
        "instance_mask": real[None].astype(np.int8),
        "mask": mask[None].astype(np.int8),
        "kind": rng.integers(0, len(schema.KINDS), 1),
    }


def session(weights: dict[str, np.ndarray], requests: int) -> onnxruntime.InferenceSession:
    graph = build_graph(weights, requests).SerializeToString()
    return onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("requests", [1, schema.OFFERS])
@pytest.mark.parametrize(("hidden", "layers"), [(32, 2), (7, 1), (16, 3), (8, 0)])
def test_the_graph_is_the_network(hidden, layers, requests):
    network = DenseNetwork(NetworkConfig(hidden, layers), seed=1)
    rng = np.random.default_rng(0)
    # Fresh biases are 0 and fresh scores near uniform; neither would show a fault.
    weights = {n: p.detach().numpy() + rng.normal(0, 0.1, p.shape) for n, p in network.named_parameters()}
    weights = {name: value.astype(np.float32) for name, value in weights.items()}
    run = session(weights, requests)
    for instances in (1, 2, 5, 16, 70):
        for _ in range(3):
            obs = observation(instances, requests, rng)
            expected = numpy_policy.forward(weights, obs)[0]
            feed = {name: array[0] if name in UNBATCHED else array for name, array in obs.items()}
            found = run.run(["logits"], feed)[0].T
            legal = obs["mask"] != 0
            np.testing.assert_allclose(found[legal], expected[legal], rtol=1e-4, atol=1e-4)
            assert (found[~legal] <= -1e9).all()


def test_numbers_that_are_none_reach_the_scores():
    weights = {n: p.detach().numpy() for n, p in DenseNetwork(seed=1).named_parameters()}
    run, rng = session(weights, 1), np.random.default_rng(0)
    for name in ("instances", "requests", "edges", "globals", "history"):
        obs = observation(4, 1, rng)
        obs["instance_mask"][:] = obs["mask"][:] = 1
        obs[name].reshape(-1)[2] = np.nan
        feed = {n: array[0] if n in UNBATCHED else array for n, array in obs.items()}
        assert np.isnan(run.run(["logits"], feed)[0]).any(), name
