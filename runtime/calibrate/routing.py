"""How long the engines stand still while a router in their own process places a request."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np

from servegym.agents.heuristics import make_heuristic
from servegym.envs.cluster.capacity import saturation_rps
from servegym.envs.cluster.episode import Episode
from servegym.envs.cluster.spec import ClusterSpec, InstanceSpec
from servegym.envs.costs.profile import Profile, save_profile
from servegym.envs.scenario import Scenario
from servegym.envs.workloads import make_workload, scale_rate
from servegym.runtime.decider import DEFAULT_FALLBACK
from servegym.runtime.engine.cluster import EnginePlayer
from servegym.runtime.engine.model import Transformer

REQUESTS, OUTPUT, LOAD = 64, 8, 2.0  # twice what the engines can serve, so that they are at work
SEATS = 8  # requests that the KV pool of each holds


def dispatch_s(model: Transformer, profile: Profile, replicas: int) -> float:
    """Median seconds of a dispatch among so many replicas of the model, which are at work.

    The router shares the interpreter with them and uses it all the while; and where they have the caches to
    themselves between two requests, it takes several times as long as on its own.

    Args:
        model: weights that the profile was measured with.
        profile: what the replicas cost, for what the router knows of them.
    """
    prompt = max(profile.token_budget // 2, 1)
    blocks = min(SEATS * -(-(prompt + OUTPUT) // profile.block_tokens), profile.kv_blocks)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "profile.json"
        save_profile(profile, path)
        spec = InstanceSpec(str(path), kv_blocks=blocks, block_tokens=profile.block_tokens)
        fleet = ClusterSpec("calibration", (spec,) * replicas, prefix_caching=False)
        workload = make_workload(
            "calibration", np.arange(REQUESTS, dtype=float), [prompt] * REQUESTS, [OUTPUT] * REQUESTS
        )
        workload = scale_rate(workload, LOAD * saturation_rps(fleet, workload))
        player = EnginePlayer({str(path): model})
        episode = Episode(workload, fleet, workload.output_tokens)
        player.play(make_heuristic(DEFAULT_FALLBACK), Scenario(scrape_s=0.0), episode)
    return median(player.dispatches)
