"""Random observations of any size, with padding and illegal candidates, and networks that look trained."""

import numpy as np
import pytest
import torch

from servegym.envs.cluster import schema
from servegym.models.config import NetworkConfig
from servegym.models.dense import DenseNetwork
from servegym.models.features import IS_LOG, SCALE, WIDTH


def random_observation(seed, lanes=3, real=5, instances=5, requests=1):
    """B lanes in which the first `real` of `instances` rows are real and some candidates are illegal."""
    rng = np.random.default_rng(seed)
    count = requests * instances + 1
    candidates = np.zeros((lanes, count, 2), np.int32)
    candidates[:, 1:, 0] = np.repeat(np.arange(requests), instances)
    candidates[:, 1:, 1] = np.tile(np.arange(instances), requests)
    candidates[:, 0, 1] = rng.integers(0, real, lanes)
    mask = rng.random((lanes, count)) < 0.8
    mask &= candidates[..., 1] < real
    mask[:, 0] = True

    def positive(name, *shape):
        values = rng.exponential(10 ** rng.uniform(-1, 2, WIDTH[name]), (*shape, WIDTH[name]))
        return np.where(IS_LOG[name], values * SCALE[name], values % 2).astype(np.float32)

    edges = positive("edges", lanes, count)
    edges[..., schema.column(schema.EDGE, "is_default")] = np.arange(count) == 0
    totals = positive("globals", lanes)
    totals[:, schema.column(schema.GLOBAL, "instances")] = real
    return {
        "instances": positive("instances", lanes, instances),
        "requests": positive("requests", lanes, requests),
        "candidates": candidates,
        "edges": edges,
        "globals": totals,
        "history": rng.poisson(3, (lanes, schema.HISTORY)).astype(np.float32),
        "instance_mask": np.broadcast_to(np.arange(instances) < real, (lanes, instances)).astype(np.int8),
        "mask": mask.astype(np.int8),
        "kind": rng.integers(0, len(schema.KINDS), lanes),
    }


@pytest.fixture(scope="session")
def observation():
    """The function itself: tests ask for the sizes they need."""
    return random_observation


def network_like_trained(hidden, layers, seed):
    """A network whose every parameter is away from zero, biases and scores included."""
    network = DenseNetwork(NetworkConfig(hidden, layers), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return network


@pytest.fixture(scope="session")
def trained_like():
    """The function itself."""
    return network_like_trained
