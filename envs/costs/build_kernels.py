"""A profile from tables of single kernels: GEMM, prefill attention, decode attention, collectives.

The folder holds gemm, context_attention, generation_attention, custom_allreduce and nccl .parquet files with
the columns of aiconfigurator's databases (NVIDIA, Apache-2.0); latency_ms is milliseconds a call.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from servegym.envs.costs.fitting import (
    as_curve,
    as_surface,
    between,
    grid,
    left_out,
    power_law,
    relative_error,
)
from servegym.envs.costs.geometry import DEVICES, engine_defaults, geometry, kv_blocks
from servegym.envs.costs.profile import Curve, Error, Geometry, Profile, Provenance, extended
from servegym.envs.costs.typical import typical_links
from servegym.errors import InputError

TOKEN_KNOTS = tuple(2**k for k in range(16))
CHUNK_END = 32768
PAST_KNOTS = (0, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
MIN_CONTEXT = 64  # shorter contexts cost the launch
# Norm, rotary, activation and cache write of few tokens: the floor of such kernels on two measured GPUs.
SMALL_KERNEL_US = 2.0
BANDWIDTH_EFFICIENCY = 0.8  # of the data sheet's, in element-wise kernels


class Kernels:
    """Rows of one system in a folder of kernel tables, as arrays; `latency_ms` turned into microseconds."""

    def __init__(self, folder: Path, system: str) -> None:
        self.folder, self.system = folder, system
        self.versions: set[str] = set()

    def version(self) -> str:
        """Version of the engine whose GEMM was measured."""
        return ", ".join(sorted(self.versions)) or "unknown"

    def rows(self, table: str, columns: list[str], **equal: object) -> np.ndarray:
        """Structured rows (columns..., us) with the fastest kernel for each key.

        Raises:
            InputError: no such file or column, or no row fits.
        """
        path = self.folder / f"{table}.parquet"
        try:
            data = pq.read_table(path, filters=[("system", "=", self.system)])
        except (OSError, ValueError) as error:
            raise InputError(path, "file", path.name, f"cannot be read as Parquet: {error}") from error
        for name in (*columns, *equal, "latency_ms"):
            if name not in data.column_names:
                raise InputError(path, name, None, "missing column")
        for name, value in equal.items():
            data = data.filter(pc.equal(data[name], value))
        if "window_size" in data.column_names:  # sliding-window kernels are another model's
            data = data.filter(pc.equal(pc.fill_null(data["window_size"].cast("float64"), 0.0), 0.0))
        if data.num_rows == 0:
            asked = ", ".join(f"{name}={value}" for name, value in equal.items())
            raise InputError(path, "system", self.system, f"no row with {asked}")
        keys = np.stack([data[name].to_numpy().astype(np.int64) for name in columns], axis=1)
        us = data["latency_ms"].to_numpy().astype(float) * 1e3
        if not (np.isfinite(us) & (us > 0)).all():
            raise InputError(path, "latency_ms", float(us[~(us > 0)][0]), "must be positive and finite")
        if "source_version" in data.column_names:
            self.versions |= set(data["source_version"].to_pylist()) if table == "gemm" else set()
        unique, which = np.unique(keys, axis=0, return_inverse=True)
        fastest = np.full(len(unique), np.inf)
        np.minimum.at(fastest, which.ravel(), us)
        return np.column_stack([unique, fastest])


class Gemm:
    """Microseconds of [m, k] x [k, n] by m; between measured (n, k) bilinear, beyond them proportional."""

    def __init__(self, rows: np.ndarray) -> None:
        self.m = np.unique(rows[:, 0]).astype(int)
        self.shapes: dict[tuple[int, int], np.ndarray] = {}
        for n, k in np.unique(rows[:, 1:3], axis=0).astype(int):
            part = rows[(rows[:, 1] == n) & (rows[:, 2] == k)]
            self.shapes[n, k] = extended(part[:, 0], part[:, 3], self.m)

    def __call__(self, n: int, k: int) -> np.ndarray:
        """Microseconds at every measured m."""
        inner = sorted({shape[1] for shape in self.shapes})
        return _between(k, [j for j in inner if len(self._outer(j)) > 1], lambda j: self._at(n, j))

    def _outer(self, k: int) -> list[int]:
        return sorted(shape[0] for shape in self.shapes if shape[1] == k)

    def _at(self, n: int, k: int) -> np.ndarray:
        return _between(n, self._outer(k), lambda i: self.shapes[i, k])


def _between(x: int, axis: list[int], value: Callable[[int], np.ndarray]) -> np.ndarray:
    """Linear between the neighbours of x on the axis; proportional to x beyond its end."""
    if x >= axis[-1]:
        return value(axis[-1]) * (x / axis[-1])
    high = int(np.searchsorted(axis, x))
    if axis[high] == x or high == 0:
        return value(axis[high])
    low = high - 1
    weight = (x - axis[low]) / (axis[high] - axis[low])
    return (1 - weight) * value(axis[low]) + weight * value(axis[high])


def build_from_kernels(
    folder: str | Path, *, system: str, model: str, tp: int = 1, name: str = ""
) -> Profile:
    """The profile of `model` on `tp` devices of `system`, composed from kernels.

    Raises:
        InputError: unknown system or model, a file or column that is missing, or no row for the shapes.
    """
    if system not in DEVICES:
        raise InputError("profile build", "system", system, f"known systems: {', '.join(DEVICES)}")
    shape = geometry(model)
    if tp < 1 or shape.heads % tp or shape.kv_heads % tp:
        raise InputError("profile build", "tp", tp, f"must divide {shape.heads} and {shape.kv_heads} heads")
    device, bandwidth = DEVICES[system]
    kernels = Kernels(Path(folder), system)
    gemm = Gemm(kernels.rows("gemm", ["m", "n", "k"], gemm_dtype="bfloat16"))
    linear, head = _linear(gemm, shape, tp, bandwidth), gemm(shape.vocabulary // tp, shape.hidden)
    attention, floor, errors = _attention(kernels, shape, tp)
    budget, sequences = engine_defaults(device.memory_bytes)
    held_out = {
        "linear": relative_error(*left_out(gemm.m, linear)),
        "head": relative_error(*left_out(gemm.m, head)),
        **errors,
    }
    return Profile(
        name or f"{system.split('_')[0]}-{model.lower()}" + (f"-tp{tp}" if tp > 1 else ""),
        shape,
        device,
        tensor_parallel=tp,
        kv_blocks=kv_blocks(shape, device, tp),
        block_tokens=16,
        token_budget=budget,
        max_seqs=sequences,
        overhead_us=round(floor * shape.layers, 2),
        linear=as_curve(gemm.m, linear),
        head=as_curve(gemm.m, head),
        collective=_collective(kernels, shape, tp),
        **attention,
        **typical_links(device.name, shape, tp),
        provenance=Provenance(
            f"kernel tables of aiconfigurator-core 0.12.0 (NVIDIA, Apache-2.0), {system}",
            f"vLLM {kernels.version()}",
            "2026",
            held_out,
            _NOTES,
        ),
    )


_NOTES = (
    "held-out errors leave every other measured point out; the profile keeps all points",
    "batched_prefill: attention of equal prompts in one launch against the sum of single ones",
    "overhead is the launch floor of attention; kernels follow each other and the host is hidden, as with "
    "CUDA graphs and asynchronous scheduling",
    "norms, rotary, activation, cache write: 2 us a kernel plus bytes at 0.8 of the data sheet's bandwidth",
    "attention of a chunk after a prefix: the whole prompt's time by its share of the work, at least one "
    "pass over the keys",
    "unequal contexts and decodes beside a prefill were not measured: no skew, and their costs add up",
)


def _linear(gemm: Gemm, shape: Geometry, tp: int, bandwidth: float) -> np.ndarray:
    """Microseconds of all layers without attention, at every measured m."""
    heads = (shape.heads + 2 * shape.kv_heads) * shape.head_dim // tp
    wide = shape.intermediate // tp
    layer = gemm(heads, shape.hidden) + gemm(shape.hidden, shape.heads * shape.head_dim // tp)
    layer = layer + gemm(2 * wide, shape.hidden) + gemm(shape.hidden, wide)
    # Two norms with residual (read 2, write 2), rotary and cache write, gated activation (read 2, write 1).
    values = 2 * 4 * shape.hidden + 2 * heads + heads + 3 * wide
    memory_s = gemm.m * values * shape.bytes_per_value / (bandwidth * BANDWIDTH_EFFICIENCY)
    return shape.layers * (layer + 5 * SMALL_KERNEL_US + memory_s * 1e6)


def _attention(kernels: Kernels, shape: Geometry, tp: int) -> tuple[dict[str, Any], float, dict[str, Error]]:
    """Prefill and decode attention above the launch floor, all layers; the floor of one layer; the errors."""
    heads = {
        "num_heads": shape.heads // tp,
        "num_key_value_heads": shape.kv_heads // tp,
        "head_dim": shape.head_dim,
        "kv_cache_dtype": "bfloat16",
    }
    rows = kernels.rows("generation_attention", ["batch_size", "step"], **heads)
    batches, contexts, decode = grid(rows[:, 0], rows[:, 1] + 1, rows[:, 2])
    floor = float(rows[:, 2].min())
    prompts = kernels.rows("context_attention", ["batch_size", "isl"], step=0, **heads)
    single, batched = prompts[prompts[:, 0] == 1], prompts[prompts[:, 0] > 1]
    isl, whole = single[:, 1], single[:, 2] - floor
    pairs = [left_out(contexts, row) for row in decode]
    errors = {
        "decode_attention": relative_error(*(np.concatenate(side) for side in zip(*pairs, strict=True))),
        "prefill_attention": relative_error(*left_out(isl, whole, power_law, floor)),
        "batched_prefill": relative_error(
            batched[:, 0] * power_law(isl, whole, batched[:, 1]) + floor, batched[:, 2]
        ),
    }
    chunks = between(isl, CHUNK_END)
    total = chunks[:, None] + np.asarray(PAST_KNOTS)
    share = 1 - (np.asarray(PAST_KNOTS) / total) ** 2
    pass_over_keys = extended(contexts, decode[0] - floor, total)
    prefill = np.maximum(power_law(isl, whole, total) * share, pass_over_keys)
    keep = contexts >= MIN_CONTEXT
    surfaces = {
        "decode_attention": as_surface(batches, contexts[keep], shape.layers * (decode[:, keep] - floor)),
        "prefill_attention": as_surface(chunks, np.asarray(PAST_KNOTS), shape.layers * prefill),
    }
    return surfaces, floor, errors


def _collective(kernels: Kernels, shape: Geometry, tp: int) -> Curve | None:
    """Two all-reduces of tokens x hidden a layer: the faster of vLLM's custom kernel and NCCL."""
    if tp == 1:
        return None
    custom = kernels.rows("custom_allreduce", ["message_size"], num_gpus=tp, backend="vllm_graph")
    nccl = kernels.rows("nccl", ["message_size"], num_gpus=tp, op_name="all_reduce", nccl_dtype="half")
    size = np.asarray(TOKEN_KNOTS) * shape.hidden
    us = np.minimum(*(extended(rows[:, 0], rows[:, 1], size) for rows in (custom, nccl)))
    return as_curve(np.asarray(TOKEN_KNOTS), 2 * shape.layers * np.maximum.accumulate(us))
