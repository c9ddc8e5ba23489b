"""A tiny model and an instance's settings, for the tests of the engine and of what measures it."""

import json

import pytest

from servegym.envs.cluster.settings import Setting
from servegym.envs.cluster.state import NEVER

TINY = {
    "model_type": "qwen3", "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 331,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip


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
    """A model whose rounding is far below the distance of any two logits; on a GPU where there is one."""
    import torch

    from servegym.runtime.engine.config import load_config
    from servegym.runtime.engine.model import Transformer

    config = load_config(write_config())
    if torch.cuda.is_available():  # whose kernel takes no float64
        return Transformer(config, "cuda", "float32")
    return Transformer(config, dtype="float64")


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
