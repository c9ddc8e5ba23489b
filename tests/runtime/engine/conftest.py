"""A tiny model, and a profile of it whose numbers nobody trusts but whose fields are all there."""

import json

import pytest
import torch

from servegym.envs.cluster.settings import Setting
from servegym.envs.cluster.state import NEVER
from servegym.envs.costs.profile import Curve, Device, Link, Profile, Provenance, Surface, save_profile
from servegym.runtime.engine.config import load_config
from servegym.runtime.engine.model import Transformer

TINY = {
    "model_type": "qwen3", "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 331,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def write_config(tmp_path_factory):
    """Write a config.json in a folder of its own; returns the folder."""

    def write(**changes):
        folder = tmp_path_factory.mktemp("model")
        raw = {k: v for k, v in {**TINY, **changes}.items() if v is not None}
        (folder / "config.json").write_text(json.dumps(raw))
        return folder

    return write


@pytest.fixture(scope="session")
def tiny(write_config):
    """A model whose rounding is far below the distance of any two logits."""
    return Transformer(load_config(write_config()), dtype="float64")


@pytest.fixture(scope="session")
def tiny_profile(write_config):
    """Path of a profile beside the config.json of its model."""
    folder = write_config()
    flat = Surface((0, 1000), (0, 1000), ((0.0, 0.0), (0.0, 0.0)))
    link = Link(seconds_per_call=1e-5, bytes_per_second=1e9)
    profile = Profile(
        name="tiny", model=load_config(folder).geometry(4), device=Device("none", memory_bytes=1),
        tensor_parallel=1, kv_blocks=64, block_tokens=4, token_budget=64, max_seqs=16, overhead_us=1000.0,
        linear=Curve((0, 64), (0.0, 1000.0)), head=Curve((0, 1), (0.0, 0.0)), prefill_attention=flat,
        decode_attention=flat, swap=link, network=link,
        provenance=Provenance("made up", "none", "2026-01-01"),
    )  # fmt: skip
    path = folder / "profile.json"
    save_profile(profile, path)
    return str(path)


@pytest.fixture(scope="session")
def setting():
    """Make settings of an instance; by default little memory and blocks of four tokens."""

    def make(**changes):
        values = Setting(
            blocks=40, block_tokens=4, budget=32, max_seqs=8, watermark=0, by_priority=False, reserve=True,
            caching=True, asynchronous=False, host_blocks=0, by_swap=False, swap_call=0, swap_block=0,
            swap_group=60, overlap=0, net_call=0, net_block=0, drain=NEVER,
        )  # fmt: skip
        return values._replace(**changes)

    return make
