"""Copies: a call and the bytes that follow, fitted to copies of many sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from servegym.envs.costs.fitting import relative_error
from servegym.envs.costs.profile import Error, Link

FASTEST = 1e15  # bytes/s of a link whose time does not grow with its bytes


@dataclass(frozen=True)
class Copies:
    """What copies of one way took.

    Attributes:
        calls: copies that the driver was asked for, float64 [N].
        bytes: carried by all of them, float64 [N].
        seconds: until all had arrived, float64 [N].
    """

    calls: np.ndarray
    bytes: np.ndarray
    seconds: np.ndarray


def measure_copies(
    copy: Callable[[int, int], Sequence[float]],
    blocks: Sequence[int],
    groups: Sequence[int],
    block_bytes: int,
    rounds: int,
    seed: int = 0,
) -> dict[int, list[Copies]]:
    """Median times of copies of so many blocks, group -> each way; all in one random order.

    Args:
        copy: copies that many blocks in groups of so many, one way after the other, and returns the seconds
            that each took.
        blocks: sizes to try.
        groups: blocks that a call carries, to try.
        block_bytes: bytes of a block.
        rounds: times that each size is copied, after one that is forgotten.
        seed: of the order.
    """
    rng = np.random.default_rng(seed)
    trials = [(size, group) for group in groups for size in blocks]
    taken: list[list[Sequence[float]]] = [[] for _ in trials]
    for _ in range(rounds + 1):
        for i in rng.permutation(len(trials)):
            taken[i].append(copy(*trials[i]))
    sizes = np.asarray(blocks, dtype=float)
    medians = np.median(np.array(taken)[:, 1:], axis=1)  # [groups x sizes, ways]
    return {
        group: [Copies(np.ceil(sizes / group), sizes * block_bytes, way) for way in seconds.T]
        for group, seconds in zip(groups, np.split(medians, len(groups)), strict=True)
    }


def joined(ways: Sequence[Copies]) -> Copies:
    """All copies of some ways, which one link is to explain."""
    columns = zip(*((way.calls, way.bytes, way.seconds) for way in ways), strict=True)
    return Copies(*map(np.concatenate, columns))


def fit_link(copies: Copies, calls_each: int = 1) -> tuple[Link, Error]:
    """Latency and bandwidth by least squares on relative errors, and the error on every other size.

    Args:
        copies: sizes in rising order, of each way if there are several.
        calls_each: calls that the cost model counts where `copies` counts one: two a layer for swaps.
    """
    every_other = np.arange(len(copies.seconds)) % 2 == 1
    latency, per_byte = _solve(copies, ~every_other)
    predicted = latency * copies.calls + per_byte * copies.bytes
    error = relative_error(predicted[every_other], copies.seconds[every_other])
    latency, per_byte = _solve(copies, np.ones(len(copies.seconds), dtype=bool))
    call, rate = latency / calls_each, 1 / max(per_byte, 1 / FASTEST)
    return Link(seconds_per_call=float(f"{call:.5g}"), bytes_per_second=float(f"{rate:.5g}")), error


def _solve(copies: Copies, use: np.ndarray) -> tuple[float, float]:
    """Seconds a call and a byte."""
    columns = np.stack([copies.calls, copies.bytes], axis=1)[use] / copies.seconds[use, None]
    scale = np.linalg.norm(columns, axis=0)
    latency, per_byte = nnls(columns / scale, np.ones(int(use.sum())))[0] / scale
    return float(latency), float(per_byte)
