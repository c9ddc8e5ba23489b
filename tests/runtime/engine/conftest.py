"""A profile of the tiny model, whose numbers nobody trusts but whose fields are all there."""

import pytest
import torch

from servegym.envs.costs.profile import Curve, Device, Link, Profile, Provenance, Surface, save_profile
from servegym.runtime.engine.config import load_config
from servegym.runtime.engine.model import geometry


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_profile(write_config):
    """Path of a profile beside the config.json of its model."""
    folder = write_config()
    flat = Surface((0, 1000), (0, 1000), ((0.0, 0.0), (0.0, 0.0)))
    link = Link(seconds_per_call=1e-5, bytes_per_second=1e9)
    profile = Profile(
        name="tiny", model=geometry(load_config(folder), 4), device=Device("none", memory_bytes=1),
        tensor_parallel=1, kv_blocks=64, block_tokens=4, token_budget=64, max_seqs=16, overhead_us=1000.0,
        linear=Curve((0, 64), (0.0, 1000.0)), head=Curve((0, 1), (0.0, 0.0)), prefill_attention=flat,
        decode_attention=flat, swap=link, network=link,
        provenance=Provenance("made up", "none", "2026-01-01"),
    )  # fmt: skip
    path = folder / "profile.json"
    save_profile(profile, path)
    return str(path)
