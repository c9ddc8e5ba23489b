"""A profile from tables of single kernels: GEMM, prefill attention, decode attention, collectives.

The folder holds gemm, context_attention, generation_attention, custom_allreduce and nccl .parquet files with the
columns of aiconfigurator's databases (NVIDIA, Apache-2.0); latency_ms is milliseconds a call.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from servegym.envs.costs.geometry import DEVICES, engine_defaults, geometry, kv_blocks
from servegym.envs.costs.held_out import relative_error
from servegym.envs.costs.profile import Curve, Geometry, Profile, Provenance, Surface, extended
from servegym.errors import InputError

TOKEN_KNOTS = (1, 2, 4, 8, 16, 32, 48, 64, 80, 96, 128, 160, 192, 256, 384, 512, 768, 1024, 1536, 2048)
TOKEN_KNOTS += (2560, 3072, 4096, 8192, 16384)
CHUNK_KNOTS = (0, 16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384)
PAST_KNOTS = (0, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
CONTEXT_KNOTS = (0, 16, 64, 256, 1024, 4096, 16384, 65536)
# A small kernel inside a CUDA graph: the floor of norm, rotary, activation and cache write on two measured GPUs.
SMALL_KERNEL_US = 2.0
BANDWIDTH_EFFICIENCY = 0.8  # of the data sheet's, in element-wise kernels


class Kernels:
    """Rows of one system in a folder of kernel tables, as arrays; `latency_ms` turned into microseconds."""

    def __init__(self, folder: Path, system: str) -> None:
        self.folder, self.system = folder, system

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
            data = data.filter(pc.equal(pc.fill_null(data["window_size"], 0), 0))
        if data.num_rows == 0:
            asked = ", ".join(f"{name}={value}" for name, value in equal.items())
            raise InputError(path, "system", self.system, f"no row with {asked}")
        keys = np.stack([data[name].to_numpy().astype(np.int64) for name in columns], axis=1)
        us = data["latency_ms"].to_numpy().astype(float) * 1e3
        if not (np.isfinite(us) & (us > 0)).all():
            raise InputError(path, "latency_ms", float(us[~(us > 0)][0]), "must be positive and finite")
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


def _between(x: int, axis: list[int], value) -> np.ndarray:  # type: ignore[no-untyped-def]
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
    linear, head = _linear(gemm, shape, tp, bandwidth), _head(gemm, shape, tp)
    decode, floor, decode_error = _decode(kernels, shape, tp)
    prefill, prefill_error = _prefill(kernels, shape, tp, decode, floor)
    budget, sequences = engine_defaults(device.memory_bytes)
    knots = [i for i, m in enumerate(gemm.m) if m in TOKEN_KNOTS]
    kept = Curve(tuple(gemm.m[knots].tolist()), _round(linear[knots]))
    kept_head = Curve(tuple(gemm.m[knots].tolist()), _round(head[knots]))
    others = np.setdiff1d(np.arange(len(gemm.m)), knots)
    held_out = {
        "linear": relative_error(kept(gemm.m[others]), linear[others]),
        "head": relative_error(kept_head(gemm.m[others]), head[others]),
        "prefill_attention": prefill_error,
        "decode_attention": decode_error,
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
        linear=kept,
        collective=_collective(kernels, shape, tp),
        head=kept_head,
        prefill_attention=prefill,
        decode_attention=decode,
        provenance=Provenance("aiconfigurator-core 0.12.0", "vLLM kernels", "2026", held_out),
    )


def _round(us: np.ndarray) -> tuple[float, ...]:
    return tuple(float(f"{value:.5g}") for value in us)


def _linear(gemm: Gemm, shape: Geometry, tp: int, bandwidth: float) -> np.ndarray:
    """Microseconds of all layers without attention, at every measured m."""
    heads = (shape.heads + 2 * shape.kv_heads) * shape.head_dim // tp
    wide = shape.intermediate // tp
    layer = gemm(heads, shape.hidden) + gemm(shape.hidden, shape.heads * shape.head_dim // tp)
    layer = layer + gemm(2 * wide, shape.hidden) + gemm(shape.hidden, wide)
    # Two norms with residual (read 2, write 2), rotary and cache write, gated activation (read 2, write 1).
    values = 2 * 4 * shape.hidden + 2 * heads + heads + 3 * wide
    small = (
        5 * SMALL_KERNEL_US
        + gemm.m * values * shape.bytes_per_value / (bandwidth * BANDWIDTH_EFFICIENCY) * 1e6
    )
    return shape.layers * (layer + small)


def _head(gemm: Gemm, shape: Geometry, tp: int) -> np.ndarray:
    return gemm(shape.vocabulary // tp, shape.hidden)


def _decode(kernels: Kernels, shape: Geometry, tp: int) -> tuple[Surface, float, object]:
    """Decode attention above the launch floor, all layers; the floor of one layer; the error."""
    rows = kernels.rows("generation_attention", ["batch_size", "step"], **_heads(shape, tp))
    batches = np.unique(rows[:, 0]).astype(int)
    floor = float(rows[:, 2].min())
    surface, predicted, measured = [], [], []
    for batch in batches:
        part = rows[rows[:, 0] == batch]
        context, us = part[:, 1] + 1, part[:, 2] - floor
        keep = np.isin(context, CONTEXT_KNOTS)
        at, us_at = context[keep], us[keep]
        line = np.concatenate([[us_at[0]], us_at]), np.concatenate([[0], at])
        surface.append(extended(line[1], line[0], np.asarray(CONTEXT_KNOTS)))
        predicted.append(extended(line[1], line[0], context[~keep]) + floor)
        measured.append(us[~keep] + floor)
    us = shape.layers * np.asarray(surface)
    table = Surface(
        (0, *batches.tolist()),
        CONTEXT_KNOTS,
        (tuple([0.0] * len(CONTEXT_KNOTS)), *(_round(row) for row in us)),
    )
    return table, floor, relative_error(np.concatenate(predicted), np.concatenate(measured))


def _heads(shape: Geometry, tp: int) -> dict[str, object]:
    return {
        "num_heads": shape.heads // tp,
        "num_key_value_heads": shape.kv_heads // tp,
        "head_dim": shape.head_dim,
        "kv_cache_dtype": "bfloat16",
    }


def _prefill(
    kernels: Kernels, shape: Geometry, tp: int, decode: Surface, floor: float
) -> tuple[Surface, object]:
    """Prefill attention above the launch floor, all layers, and its error on batches of prompts.

    Only whole prompts are measured. Of a prompt of `chunk + past` tokens the chunk does
    ((chunk + past)^2 - past^2) / (chunk + past)^2 of the work, and never less than one pass over its keys.
    """
    rows = kernels.rows("context_attention", ["batch_size", "isl"], step=0, **_heads(shape, tp))
    single = rows[rows[:, 0] == 1]
    whole = PowerLaw(single[:, 1], np.maximum(single[:, 2] - floor, 1e-3))
    table = []
    for chunk in CHUNK_KNOTS:
        total = np.asarray(PAST_KNOTS, dtype=float) + chunk
        if chunk == 0:
            table.append(np.zeros(len(total)))
            continue
        share = 1 - (np.asarray(PAST_KNOTS) / total) ** 2
        pass_over_keys = extended(np.asarray(decode.columns), np.asarray(decode.us[1]), total) / shape.layers
        table.append(np.maximum(whole(total) * share, pass_over_keys))
    batched = rows[rows[:, 0] > 1]
    predicted = batched[:, 0] * whole(batched[:, 1]) + floor
    surface = Surface(CHUNK_KNOTS, PAST_KNOTS, tuple(_round(shape.layers * row) for row in table))
    return surface, relative_error(predicted, batched[:, 2])


class PowerLaw:
    """Interpolation in logarithms, exact for monomials; the last two points' power beyond the end."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        self.x, self.y = np.log(x), np.log(y)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return np.exp(extended(self.x, self.y, np.log(np.asarray(x, dtype=float))))


def _collective(kernels: Kernels, shape: Geometry, tp: int) -> Curve | None:
    """Two all-reduces of tokens x hidden a layer: the faster of vLLM's custom kernel and NCCL."""
    if tp == 1:
        return None
    custom = kernels.rows("custom_allreduce", ["message_size"], num_gpus=tp, backend="vllm_graph")
    nccl = kernels.rows("nccl", ["message_size"], num_gpus=tp, op_name="all_reduce", nccl_dtype="half")
    size = np.asarray(TOKEN_KNOTS) * shape.hidden
    us = np.minimum(*(extended(rows[:, 0], rows[:, 1], size) for rows in (custom, nccl)))
    return Curve(TOKEN_KNOTS, _round(2 * shape.layers * np.maximum.accumulate(us)))
