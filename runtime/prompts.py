"""Token ids for the rows of a workload, which has lengths and prefix blocks but no text."""

from __future__ import annotations

import numpy as np

from servegym.envs.workloads.workload import NO_ID, Workload


def token_ids(workload: Workload, row: int, vocabulary: int) -> np.ndarray:
    """Prompt and output of a row, int64: the same each time, and equal blocks where prefix ids are equal.

    The output is fixed, too, because the prompt of a session's next turn repeats it.
    """
    position = np.arange(int(workload.prompt_tokens[row]) + int(workload.output_tokens[row]))
    names = np.full(len(position), (1 << 32) + row)  # beyond its prefix blocks a row is like no other
    start, end = workload.prefix_offsets[row : row + 2]
    shared = int(end - start) * workload.prefix_block_tokens
    if shared:
        names[:shared] = np.repeat(workload.prefix_ids[start:end], workload.prefix_block_tokens)[:shared]
        position[:shared] %= workload.prefix_block_tokens
    return (_mix(names.astype(np.uint64), position.astype(np.uint64)) % np.uint64(vocabulary)).astype(
        np.int64
    )


def previous_turns(workload: Workload) -> list[int]:
    """Row of the request before each one in its session; -1 for none."""
    latest: dict[int, int] = {}
    previous = []
    for row, (after, session) in enumerate(zip(workload.after, workload.session, strict=True)):
        previous.append(int(after) if after >= 0 else latest.get(int(session), NO_ID))
        if session >= 0:
            latest[int(session)] = row
    return previous


def _mix(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele et al. 2014) of two numbers."""
    with np.errstate(over="ignore"):
        z: np.ndarray = x * np.uint64(0x9E3779B97F4A7C15) + y * np.uint64(0xD1B54A32D192ED03)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
