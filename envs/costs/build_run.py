"""A profile from one layer's kernels, measured inside vLLM on the device that it is for.

The folder holds engine.json, hardware.json and, under kernels/, dense.csv, per_sequence.csv, attention.csv
and skew.csv as LLMServingSim's profiler (casys-kaist/LLMServingSim, MIT) writes them. Nothing comes from a
run's request log.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from servegym.envs.costs.attention import attention_parts
from servegym.envs.costs.columns import read_csv
from servegym.envs.costs.fitting import as_curve, left_out, relative_error, widened
from servegym.envs.costs.geometry import GIB, engine_defaults, geometry_of_run, kv_blocks
from servegym.envs.costs.profile import Curve, Device, Geometry, Profile, Provenance
from servegym.envs.costs.typical import typical_links
from servegym.errors import InputError

ONCE = ("embedding", "final_layernorm")  # layers outside the decoder stack
TWICE = ("layernorm",)  # before attention and before the MLP
NEEDED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
TOKENS_END, SEQUENCES_END = 32768, 2048


def build_from_run(folder: str | Path, *, name: str = "") -> Profile:
    """The profile of the model and device in `folder`.

    Raises:
        InputError: a file, column or field that is missing or does not fit.
    """
    where = Path(folder)
    engine = read_json(where / "engine.json")
    model = geometry_of_run(where, engine)
    tp = recorded(where, engine, "engine_kwargs", "tensor_parallel_size") or 1
    device = _device(where, engine)
    at, us, linear_error = _dense(where, model)
    heads, head_us, head_error = _head(where)
    attention, errors = attention_parts(where / "kernels", model.layers)
    budget, sequences = engine_defaults(device.memory_bytes)
    held_out = {"linear": linear_error, "head": head_error, **errors}
    return Profile(
        name or where.name,
        model,
        device,
        tensor_parallel=tp,
        kv_blocks=run_blocks(where, engine) or kv_blocks(model, device, tp),
        block_tokens=16,
        token_budget=budget,
        max_seqs=sequences,
        linear=as_curve(*widened(at, us, TOKENS_END)),
        head=as_curve(*widened(heads, head_us, SEQUENCES_END)),
        collective=_collective(where, model, tp),
        **attention,
        **typical_links(device.name, model, tp),
        provenance=Provenance(
            f"casys-kaist/LLMServingSim, {where.name}/kernels",
            f"vLLM {_meta(where, 'vllm_version')}, eager, one layer",
            _meta(where, "profiled_at")[:10],
            held_out,
            _NOTES,
        ),
    )


_NOTES = (
    "held-out errors leave every other measured point out; the profile keeps all points",
    "overhead is the launch floor of attention; kernels follow each other and the host is hidden, as with "
    "CUDA graphs and asynchronous scheduling",
    "skew is the median over batches of which an eighth to a quarter is long: such two-point batches have "
    "the spread of chat batches, a standard deviation of a third to a half of longest - mean",
    "beyond the measured range (2048 tokens, 256 sequences) the curves go on as lines",
)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: unreadable, or not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(path, "file", path.name, f"cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise InputError(path, "file", type(data).__name__, "must be a JSON object")
    return data


def recorded(folder: Path, engine: dict[str, Any], section: str, field: str, low: int = 1) -> int | None:
    """A whole number of engine.json; None where the run did not record it.

    Raises:
        InputError: no whole number, or below `low`.
    """
    part = engine.get(section) or {}
    value = part.get(field) if isinstance(part, dict) else part
    if value is not None and (type(value) is not int or value < low):
        raise InputError(
            folder / "engine.json", f"{section}.{field}", value, f"must be an integer, {low} or more"
        )
    return value


def run_blocks(folder: Path, engine: dict[str, Any]) -> int | None:
    """Usable KV blocks of the run: what vLLM allots less its null block; None where it is not recorded."""
    blocks = recorded(folder, engine, "kv_cache", "num_gpu_blocks", 2)
    return None if blocks is None else blocks - 1


def _device(folder: Path, engine: dict[str, Any]) -> Device:
    memory = recorded(folder, engine, "hardware", "device_total_memory_bytes") or _assumed_memory(folder)
    hardware = engine.get("hardware") or {}
    return Device(str(hardware.get("device_name") or _meta(folder, "gpu")), memory_bytes=memory)


def _assumed_memory(folder: Path) -> int:
    """Bytes of one device as hardware.json states them, in GiB."""
    path = folder / "hardware.json"
    try:
        size = read_json(path)["nodes"][0]["instances"][0]["npu_mem"]["mem_size"]
    except (KeyError, IndexError, TypeError) as error:
        raise InputError(path, "nodes[0].instances[0].npu_mem.mem_size", None, "missing") from error
    if not isinstance(size, (int, float)) or not 0 < size < 1e6:
        raise InputError(path, "nodes[0].instances[0].npu_mem.mem_size", size, "must be positive, GiB")
    return int(size * GIB)


def _meta(folder: Path, key: str) -> str:
    """A top-level scalar of kernels/meta.yaml; `unknown` without the file or the key."""
    path = folder / "kernels" / "meta.yaml"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    values = [line.partition(":")[2].strip(" '\"") for line in lines if line.startswith(f"{key}:")]
    return values[0] if values else "unknown"


def _dense(folder: Path, model: Geometry):  # type: ignore[no-untyped-def]
    """Tokens, microseconds of all layers without attention, and the error on left-out points."""
    path = folder / "kernels" / "dense.csv"
    data = read_csv(path, ("tokens", "time_us"), text=("layer",))
    for layer in NEEDED:
        if layer not in data["layer"]:
            raise InputError(path, "layer", layer, "missing; every linear layer must be measured")
    at = np.unique(data["tokens"])
    total = np.zeros(len(at))
    for layer in np.unique(data["layer"]):
        mine = data["layer"] == layer
        times = 1 if layer in ONCE else 2 * model.layers if layer in TWICE else model.layers
        order = np.argsort(data["tokens"][mine])
        total += times * np.interp(at, data["tokens"][mine][order], data["time_us"][mine][order])
    return at, total, relative_error(*left_out(at, total))


def _head(folder: Path):  # type: ignore[no-untyped-def]
    """Sequences, microseconds of output head and sampler, and the error on left-out points."""
    path = folder / "kernels" / "per_sequence.csv"
    data = read_csv(path, ("sequences", "time_us"), text=("layer",))
    if "lm_head" not in data["layer"]:
        raise InputError(path, "layer", "lm_head", "missing; the output head must be measured")
    at = np.unique(data["sequences"])
    total = np.zeros(len(at))
    for layer in np.unique(data["layer"]):
        mine = data["layer"] == layer
        order = np.argsort(data["sequences"][mine])
        total += np.interp(at, data["sequences"][mine][order], data["time_us"][mine][order])
    return at, total, relative_error(*left_out(at, total))


def _collective(folder: Path, model: Geometry, tp: int) -> Curve | None:
    """Two ring all-reduces a layer over the link that hardware.json states (GB/s, ns)."""
    if tp == 1:
        return None
    hardware = read_json(folder / "hardware.json")
    bandwidth: Any = hardware.get("link_bw")
    latency: Any = hardware.get("link_latency", 0)
    for field, value, low in (("link_bw", bandwidth, 1e-3), ("link_latency", latency, 0)):
        if not isinstance(value, (int, float)) or not low <= value < 1e9:
            raise InputError(folder / "hardware.json", field, value, "must be a number of GB/s, or ns")
    at = np.asarray([1, TOKENS_END])
    sent = 2 * (tp - 1) / tp * at * model.hidden * model.bytes_per_value / (bandwidth * 1e9) * 1e6
    return as_curve(at, 2 * model.layers * (2 * (tp - 1) * latency / 1e3 + sent))
