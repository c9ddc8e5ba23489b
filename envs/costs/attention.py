"""Attention of prefill, of decodes, and of both in one kernel, from measured grids.

A joint launch costs prefill + mixed decodes + launch * decodes * longest chunk: decodes beside a prefill are
not split over the device, and every decode gets as many thread blocks as the longest chunk has tiles, all but
one of which return at once. Both effects are measured; their form is checked on left-out chunks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from servegym.envs.costs.columns import read_csv
from servegym.envs.costs.fitting import (
    as_curve,
    as_surface,
    between,
    grid,
    left_out,
    power_law,
    relative_error,
)
from servegym.envs.costs.profile import Error, extended
from servegym.errors import InputError

LONG_SHARE = (0.12, 0.26)  # of a two-point batch; see the note on skew in build_run
CHUNK_END = 16384
MIN_CONTEXT = 64  # shorter contexts cost the launch
LAUNCH_BATCH, LAUNCH_CONTEXT = 16, 1024  # where empty blocks, not memory traffic, set the slope


def attention_parts(folder: Path, layers: int) -> tuple[dict[str, Any], dict[str, Error]]:
    """The attention fields of a `Profile` for `layers` layers, and the error of each part.

    Args:
        folder: holds attention.csv (prefill_chunk, kv_prefill, n_decode, kv_decode, time_us of one layer) and
            skew.csv (n, ratio, pc, kv_big, kv_mean, t_mean_us, t_skew_us). Without skew.csv there is no skew.
        layers: decoder layers of the model.

    Raises:
        InputError: missing or malformed columns, or no pure prefill or decode points.
    """
    path = folder / "attention.csv"
    data = read_csv(path, ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us"))
    c, p, n, k, us = data.values()
    alone = {"decode": (c == 0) & (n > 0), "prefill": (n == 0) & (c > 0)}
    for kind, rows in alone.items():
        if rows.sum() < 4:
            raise InputError(path, kind, int(rows.sum()), f"needs at least four {kind}-only rows")
    floor = float(min(us[rows].min() for rows in alone.values()))
    decode = grid(*(x[alone["decode"]] for x in (n, k, us)))
    prefill = grid(*(x[alone["prefill"]] for x in (c, p, us)))
    keep = (decode[1] >= MIN_CONTEXT) | (decode[1] == 0)
    contexts = decode[1][keep]
    read = contexts + 1  # kv_decode counts the tokens before; a decode reads its own, too
    chunks = between(prefill[0], CHUNK_END)
    dense = np.stack([power_law(prefill[0], column, chunks) for column in (prefill[2] - floor).T], axis=1)
    fields: dict[str, Any] = {
        "overhead_us": round(layers * floor, 2),
        "decode_attention": as_surface(decode[0], read, layers * (decode[2][:, keep] - floor)),
        "prefill_attention": as_surface(chunks, prefill[1], layers * dense),
    }
    errors = {
        "decode_attention": _error(decode[1], decode[2], extended, 0.0),
        "prefill_attention": _error(prefill[0], (prefill[2] - floor).T, power_law, floor),
    }
    joint = (c > 0) & (n > 0)
    if joint.any():
        mixed = _Mixed(c[joint], n[joint], k[joint], us[joint] - _at(prefill, c[joint], p[joint]))
        errors["mixed_attention"] = mixed.error(us[joint], c, joint)
        table = np.stack([extended(mixed.table[1], row, contexts) for row in mixed.table[2]])
        fields["mixed_attention"] = as_surface(mixed.table[0], read, layers * table)
        fields["mixed_launch_us"] = float(f"{layers * mixed.launch:.5g}")
    if (folder / "skew.csv").is_file():
        fields |= _skews(folder / "skew.csv", layers, decode, errors)
    return fields, errors


def _error(at: np.ndarray, rows: np.ndarray, interpolate: Any, floor: float) -> Error:
    pairs = [left_out(at, row, interpolate, floor) for row in rows]
    return relative_error(*(np.concatenate(side) for side in zip(*pairs, strict=True)))


def _at(table: tuple[np.ndarray, np.ndarray, np.ndarray], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Values of a grid at its own points."""
    return table[2][np.searchsorted(table[0], x), np.searchsorted(table[1], y)]


class _Mixed:
    """Decode attention beside prefill: `extra` is what a joint launch costs beyond its prefill part."""

    def __init__(self, chunk: np.ndarray, n: np.ndarray, context: np.ndarray, extra: np.ndarray) -> None:
        self.chunk, self.n, self.context, self.extra = chunk, n, context, extra
        self.launch = self._launch()
        self.table = self._fit(np.ones(len(n), dtype=bool))

    def _launch(self) -> float:
        """Median over (batch, context) of the slope of the extra time against decodes * chunk tokens."""
        slopes = []
        pairs = self.n * self.chunk
        low = (self.n >= LAUNCH_BATCH) & (self.context <= LAUNCH_CONTEXT)
        for key in np.unique(np.stack([self.n, self.context], axis=1)[low], axis=0):
            rows = (self.n == key[0]) & (self.context == key[1])
            if len(np.unique(pairs[rows])) > 3:
                slopes.append(np.polyfit(pairs[rows], self.extra[rows], 1)[0])
        return max(float(np.median(slopes)), 0.0) if slopes else 0.0

    def _fit(self, use: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rest = self.extra - self.launch * self.n * self.chunk
        keys, which = np.unique(np.stack([self.n, self.context], axis=1)[use], axis=0, return_inverse=True)
        which = which.ravel()
        medians = np.asarray([np.median(rest[use][which == i]) for i in range(len(keys))])
        return grid(keys[:, 0], keys[:, 1], np.maximum(medians, 0.0))

    def error(self, us: np.ndarray, c: np.ndarray, joint: np.ndarray) -> Error:
        """Error of the joint launch on every other chunk size, fitted on the others."""
        chunks = np.unique(c[joint])
        out = np.isin(self.chunk, chunks[1::2])
        table = self._fit(~out)
        out &= np.isin(self.n, table[0]) & np.isin(self.context, table[1])
        decode = _at(table, self.n[out], self.context[out])
        launch = self.launch * self.n[out] * self.chunk[out]
        return relative_error((us - self.extra)[out] + decode + launch, us[out])


def _skews(
    path: Path, layers: int, decode: tuple[np.ndarray, np.ndarray, np.ndarray], errors: dict[str, Error]
) -> dict[str, Any]:
    """Microseconds per token from mean to longest context, by batch, alone and beside prefill.

    Alone, what an unequal batch costs beyond a uniform one is taken from the grid that the model adds it to:
    a batch measured at the same mean fills another part of its last tiles, a batch of the grid does not.
    """
    data = read_csv(path, ("n", "ratio", "pc", "kv_big", "kv_mean", "t_mean_us", "t_skew_us"))
    n, share, pc, big, mean, t_mean, t_skew = data.values()
    scale = _repetitions(n, pc, mean, t_mean, decode)
    level = np.where(pc == 0, _between(decode, n, mean), t_mean / scale)
    slope = (t_skew / scale - level) / np.maximum(big - mean, 1)
    shaped = (share >= LONG_SHARE[0]) & (share <= LONG_SHARE[1])
    fields: dict[str, Any] = {}
    for part, rows in (("decode_skew", pc == 0), ("mixed_skew", pc > 0)):
        batches = np.unique(n[rows & shaped])
        if not len(batches):
            continue
        median = np.asarray([np.median(slope[rows & shaped & (n == batch)]) for batch in batches])
        fields[part] = as_curve(batches, layers * np.maximum(median, 0))
        other = rows & ~shaped
        predicted = scale * (level + np.interp(n, batches, np.maximum(median, 0)) * (big - mean))
        errors[part] = relative_error(predicted[other], t_skew[other])
    return fields


def _repetitions(
    n: np.ndarray,
    pc: np.ndarray,
    mean: np.ndarray,
    t_mean: np.ndarray,
    decode: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> int:
    """How many launches a time in skew.csv adds up, from its uniform batches and attention.csv."""
    rows = (pc == 0) & np.isin(n, decode[0])
    if not rows.any():
        return 1
    return max(1, round(float(np.median(t_mean[rows] / _between(decode, n[rows], mean[rows])))))


def _between(
    table: tuple[np.ndarray, np.ndarray, np.ndarray], rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Values of a grid, on the line between its points."""
    at_column = np.stack([extended(table[1], row, columns) for row in table[2]], axis=1)
    return np.asarray([np.interp(x, table[0], us) for x, us in zip(rows, at_column, strict=True)])
