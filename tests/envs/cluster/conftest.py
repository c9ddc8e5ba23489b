"""A toy cluster whose numbers can be worked out on paper."""

import numpy as np
import pytest

from servegym.envs.cluster.episode import Episode
from servegym.envs.cluster.spec import ClusterSpec, InstanceSpec
from servegym.envs.costs.profile import Curve, Device, Geometry, Profile, Provenance, Surface, save_profile
from servegym.envs.workloads.workload import make_workload


@pytest.fixture(scope="session")
def toy_instance(tmp_path_factory):
    """Make an instance whose iteration takes 10 ms and `ms_per_token` a token, attention nothing."""
    folder = tmp_path_factory.mktemp("profiles")

    def make(ms_per_token: float, **settings) -> InstanceSpec:
        free = Surface((0, 1), (0, 1), ((0.0, 0.0), (0.0, 0.0)))
        profile = Profile(
            name=f"toy-{ms_per_token}",
            model=Geometry(
                "toy", layers=1, hidden=1, intermediate=1, heads=1, kv_heads=1, head_dim=1, vocabulary=1,
                parameters=1, bytes_per_value=1,
            ),
            device=Device("toy", memory_bytes=1),
            tensor_parallel=1,
            kv_blocks=10,
            block_tokens=4,
            token_budget=8,
            max_seqs=4,
            overhead_us=10_000,
            linear=Curve((0, 1), (0.0, 1000 * ms_per_token)),
            head=Curve((0, 1), (0.0, 0.0)),
            prefill_attention=free,
            decode_attention=free,
            provenance=Provenance("worked out by hand", "none", "2025-01-01"),
        )  # fmt: skip
        path = folder / f"{profile.name}.json"
        save_profile(profile, path)
        return InstanceSpec(str(path), block_tokens=4, **settings)

    return make


@pytest.fixture(scope="session")
def toy_episode(toy_instance) -> Episode:
    """Three requests on a slow (1 ms a token) and a fast (0.5 ms) instance of 40 tokens of KV."""
    workload = make_workload(
        "toy",
        [1.0, 1.02, 2.5],
        [6, 10, 4],
        [3, 4, 1],
        session=np.array([5, -1, 5]),
        turn=np.array([0, -1, 1]),
        priority=np.array([0, -2, 1]),
    )
    cluster = ClusterSpec("toy", (toy_instance(1.0), toy_instance(0.5)))
    return Episode(workload, cluster, np.array([2, 5, 1], np.int32))
