"""Shapes of the models and devices that profiles are built for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from servegym.envs.costs.profile import Device, Geometry
from servegym.errors import InputError

GIB = 1 << 30

# Sources: the models' config.json; parameters as in the model cards.
GEOMETRIES = {
    "llama-3.1-8b": Geometry(
        name="Llama-3.1-8B",
        layers=32,
        hidden=4096,
        intermediate=14336,
        heads=32,
        kv_heads=8,
        head_dim=128,
        vocabulary=128256,
        parameters=8_030_261_248,
        bytes_per_value=2,
    ),
    "llama-3.1-70b": Geometry(
        name="Llama-3.1-70B",
        layers=80,
        hidden=8192,
        intermediate=28672,
        heads=64,
        kv_heads=8,
        head_dim=128,
        vocabulary=128256,
        parameters=70_553_706_496,
        bytes_per_value=2,
    ),
    "qwen3-8b": Geometry(
        name="Qwen3-8B",
        layers=36,
        hidden=4096,
        intermediate=12288,
        heads=32,
        kv_heads=8,
        head_dim=128,
        vocabulary=151936,
        parameters=8_190_735_360,
        bytes_per_value=2,
    ),
    "qwen3-32b": Geometry(
        name="Qwen3-32B",
        layers=64,
        hidden=5120,
        intermediate=25600,
        heads=64,
        kv_heads=8,
        head_dim=128,
        vocabulary=151936,
        parameters=32_762_123_264,
        bytes_per_value=2,
    ),
    "llama-7b": Geometry(
        name="LLaMA-7B",
        layers=32,
        hidden=4096,
        intermediate=11008,
        heads=32,
        kv_heads=32,
        head_dim=128,
        vocabulary=32000,
        parameters=6_738_415_616,
        bytes_per_value=2,
    ),
}

# Memory that the driver reports, and HBM or GDDR bandwidth in bytes per second from the data sheets.
DEVICES = {
    "a100_sxm": (Device("NVIDIA A100-SXM4-80GB", memory_bytes=int(79.15 * GIB)), 2.039e12),
    "h100_sxm": (Device("NVIDIA H100 80GB HBM3", memory_bytes=int(79.10 * GIB)), 3.35e12),
    "h200_sxm": (Device("NVIDIA H200", memory_bytes=int(139.8 * GIB)), 4.8e12),
    "b200_sxm": (Device("NVIDIA B200", memory_bytes=int(178.4 * GIB)), 8.0e12),
    "l40s": (Device("NVIDIA L40S", memory_bytes=int(44.4 * GIB)), 0.864e12),
}

MEMORY_UTILISATION = 0.9  # vLLM's gpu_memory_utilization


def geometry(name: str) -> Geometry:
    """The geometry of a known model; any letter case.

    Raises:
        InputError: for an unknown model.
    """
    found = GEOMETRIES.get(name.lower().rsplit("/", 1)[-1])
    if found is None:
        raise InputError("profile build", "model", name, f"known models: {', '.join(GEOMETRIES)}")
    return found


def geometry_of_run(folder: Path, engine: dict[str, Any]) -> Geometry:
    """The geometry of the run's model: by name, else from a Hugging Face config.json in the folder.

    Raises:
        InputError: for an unknown model without a config.json, or one that lacks a field.
    """
    name = engine.get("model")
    if not isinstance(name, str):
        raise InputError(folder / "engine.json", "model", name, "must be the model's name")
    path = folder / "config.json"
    if not path.is_file():
        return geometry(name)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        hidden, layers, heads = (
            int(config[key]) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")
        )
        kv_heads, wide = int(config["num_key_value_heads"]), int(config["intermediate_size"])
        vocabulary = int(config["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(path, "config", str(error), "needs the fields of a Hugging Face config") from error
    head_dim = int(config.get("head_dim") or hidden // heads)
    attention = 2 * hidden * (heads + kv_heads) * head_dim
    embeddings = (1 if config.get("tie_word_embeddings") else 2) * vocabulary * hidden
    return Geometry(
        name=name.rsplit("/", 1)[-1],
        layers=layers,
        hidden=hidden,
        intermediate=wide,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=vocabulary,
        parameters=layers * (attention + 3 * hidden * wide) + embeddings,
        bytes_per_value=2,
    )


def engine_defaults(memory_bytes: int) -> tuple[int, int]:
    """The default (token budget, sequences) of vLLM v1 for a device."""
    return (8192, 1024) if memory_bytes >= 70 * GIB else (2048, 256)


def kv_blocks(model: Geometry, device: Device, tensor_parallel: int, block_tokens: int = 16) -> int:
    """KV blocks that fit beside weights and peak activations, as vLLM's memory profile finds them.

    Raises:
        InputError: when the weights leave no room.
    """
    budget, _ = engine_defaults(device.memory_bytes)
    wide = model.hidden + (2 * model.intermediate) // tensor_parallel
    activations = 2 * budget * wide * model.bytes_per_value + budget * model.vocabulary // tensor_parallel
    free = MEMORY_UTILISATION * device.memory_bytes - model.weight_bytes / tensor_parallel - activations
    blocks = int(free // (model.kv_bytes_per_token // tensor_parallel * block_tokens))
    if blocks < 1:
        raise InputError("profile build", "tensor_parallel", tensor_parallel, f"{model.name} does not fit")
    return blocks
