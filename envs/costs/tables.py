"""Profiles to the integer tables of the cost model; the one place where costs are rounded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from servegym.envs.costs.profile import Curve, Profile, Surface, extended
from servegym.errors import InputError

PS_PER_US = 1_000_000
PS_PER_S = 1_000_000_000_000


class CostTables(NamedTuple):
    """Tables of P profiles, stacked; every entry int64, times in picoseconds.

    Shapes: T tokens of a batch, S sequences, J context knots, A chunk knots, B past knots.

    Attributes:
        linear: [P, T + 1] linear layers, collectives and fixed overhead, by tokens in the batch.
        head: [P, S + 1] output head and sampler, by sequences.
        decode_knot: [P, J] mean context in tokens, rising from 0.
        decode_base: [P, S + 1, J] decode attention at the knot, by batch.
        decode_slope: [P, S + 1, J] picoseconds per token of total context beyond the knot.
        decode_skew: [P, S + 1] picoseconds per token by which the longest context exceeds the mean.
        mixed_base, mixed_slope, mixed_skew: the same for decodes in an iteration that prefills, too.
        mixed_launch: [P] picoseconds per decode and token of the longest chunk of such an iteration.
        chunked: [P] picoseconds that an iteration with prefill chunks takes beyond one without.
        chunk_knot: [P, A] new tokens of a prefill chunk, rising from 0.
        past_knot: [P, B] tokens that the chunk attends to beside itself, rising from 0.
        prefill: [P, A, B] prefill attention.
    """

    linear: np.ndarray
    head: np.ndarray
    decode_knot: np.ndarray
    decode_base: np.ndarray
    decode_slope: np.ndarray
    decode_skew: np.ndarray
    mixed_base: np.ndarray
    mixed_slope: np.ndarray
    mixed_skew: np.ndarray
    mixed_launch: np.ndarray
    chunked: np.ndarray
    chunk_knot: np.ndarray
    past_knot: np.ndarray
    prefill: np.ndarray


def cost_tables(profiles: Sequence[Profile], max_tokens: int, max_sequences: int) -> CostTables:
    """Tables of the given profiles, stacked in their order.

    Every table is monotone: no more tokens, sequences or context can cost less. Beyond the measured range the
    last segment goes on. Profiles with fewer knots get more of them on their last segment, which changes
    nothing.

    Args:
        max_tokens: the largest token budget. max_sequences: the largest number of sequences in an iteration.

    Raises:
        InputError: no profile, or a bound below 1.
    """
    if not profiles:
        raise InputError("cost tables", "profiles", [], "give at least one profile")
    for field, value in (("max_tokens", max_tokens), ("max_sequences", max_sequences)):
        if value < 1:
            raise InputError("cost tables", field, value, "must be at least 1")
    rows = [_tables(profile, max_tokens, max_sequences) for profile in profiles]
    sizes = {name: max(len(row[name]) for row in rows) for name in ("decode_knot", "chunk_knot", "past_knot")}
    for row in rows:
        _pad(row, sizes)
    return CostTables(**{name: np.stack([row[name] for row in rows]) for name in CostTables._fields})


def glance(tables: CostTables) -> np.ndarray:
    """Decode steps of equally long requests, as observations want them: one line of memory for each look.

    Returns:
        float32 [P, S + 1, J, 2]: seconds of a step at each knot, and for each token of context beyond it.
    """
    fixed = tables.linear[:, : tables.head.shape[1]] + tables.head
    steps = np.stack([tables.decode_base + fixed[..., None], tables.decode_slope], -1)
    return steps.astype(np.float32) / PS_PER_S


def _tables(profile: Profile, max_tokens: int, max_sequences: int) -> dict[str, np.ndarray]:
    tokens, sequences = np.arange(max_tokens + 1), np.arange(max_sequences + 1)
    linear = profile.linear(tokens) + profile.overhead_us
    if profile.collective is not None:
        linear = linear + profile.collective(tokens)
    knot = np.asarray(profile.decode_attention.columns, dtype=np.int64)
    decode = _decode(profile.decode_attention, profile.decode_skew, max_sequences)
    mixed = decode
    if profile.mixed_attention is not None:
        mixed = _decode(profile.mixed_attention, profile.mixed_skew, max_sequences)
    prefill = np.maximum.accumulate(np.maximum.accumulate(np.asarray(profile.prefill_attention.us), 0), 1)
    return {
        "linear": _ps(np.maximum.accumulate(linear)),
        "head": _ps(np.maximum.accumulate(profile.head(sequences))),
        "decode_knot": knot,
        "decode_base": decode[0],
        "decode_slope": decode[1],
        "decode_skew": decode[2],
        "mixed_base": mixed[0],
        "mixed_slope": mixed[1],
        "mixed_skew": mixed[2],
        "mixed_launch": _ps(profile.mixed_launch_us),
        "chunked": _ps(profile.chunked_us),
        "chunk_knot": np.asarray(profile.prefill_attention.rows, dtype=np.int64),
        "past_knot": np.asarray(profile.prefill_attention.columns, dtype=np.int64),
        "prefill": _ps(prefill),
    }


def _ps(us: np.ndarray | float) -> np.ndarray:
    return np.rint(np.asarray(us) * PS_PER_US).astype(np.int64)


def _decode(
    surface: Surface, skew: Curve | None, max_sequences: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Base and slope [S + 1, J], skew [S + 1]; integer slopes first, so that segments meet to the bit."""
    n = np.arange(max_sequences + 1)
    columns = np.asarray(surface.us).T
    us = np.stack([extended(np.asarray(surface.rows), column, n) for column in columns], axis=1)
    target = _ps(np.maximum.accumulate(np.maximum.accumulate(us, 0), 1))
    width = np.diff(np.asarray(surface.columns, dtype=np.int64))
    base, slope = np.zeros_like(target), np.zeros_like(target)
    base[:, 0] = target[:, 0]
    span = np.maximum(n, 1)
    for j, step in enumerate(width):
        slope[:, j] = np.maximum((target[:, j + 1] - base[:, j] + span * step // 2) // (span * step), 0)
        base[:, j + 1] = base[:, j] + slope[:, j] * span * step
    slope[:, -1] = slope[:, -2]
    return base, slope, _ps(np.zeros(max_sequences + 1) if skew is None else skew(n))


def _pad(row: dict[str, np.ndarray], sizes: dict[str, int]) -> None:
    """Add knots on the extension of the last segment until the profile has as many as the others."""
    while len(row["decode_knot"]) < sizes["decode_knot"]:
        width = row["decode_knot"][-1] - row["decode_knot"][-2]
        row["decode_knot"] = np.append(row["decode_knot"], row["decode_knot"][-1] + width)
        for kind in ("decode", "mixed"):
            base, slope = row[f"{kind}_base"], row[f"{kind}_slope"]
            end = base[:, -1] + slope[:, -1] * np.maximum(np.arange(len(base)), 1) * width
            row[f"{kind}_base"] = np.column_stack([base, end])
            row[f"{kind}_slope"] = np.column_stack([slope, slope[:, -1]])
    for name, axis in (("chunk_knot", 0), ("past_knot", 1)):
        while len(row[name]) < sizes[name]:
            knots, table = row[name], np.moveaxis(row["prefill"], axis, 0)
            row[name] = np.append(knots, 2 * knots[-1] - knots[-2])
            table = np.concatenate([table, (2 * table[-1] - table[-2])[None]])
            row["prefill"] = np.moveaxis(table, 0, axis)
