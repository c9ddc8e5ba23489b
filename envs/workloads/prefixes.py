"""Chained prefix-block ids as ragged arrays: row i owns ids[offsets[i]:offsets[i + 1]]."""

from __future__ import annotations

import numpy as np


def full_blocks(
    prompt: np.ndarray, output: np.ndarray, next_prompt: np.ndarray, block_tokens: int
) -> np.ndarray:
    """Named blocks a row: those of its prompt, and of its output where the next turn keeps it whole.

    Args:
        prompt: tokens, [N].
        output: tokens, [N].
        next_prompt: prompt tokens of the turn that continues this row's context, 0 where none does, [N].
        block_tokens: tokens of a block.
    """
    context = prompt + output
    return np.where(next_prompt >= context, context, prompt) // block_tokens


def chained_ids(
    chain: np.ndarray, blocks: np.ndarray, root: np.ndarray, shared: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Name the blocks of contexts that only grow, without gaps from 0.

    Args:
        chain: the growing context that each row belongs to, 0..C-1, [N].
        blocks: named blocks of each row, [N].
        root: chain whose leading blocks a chain begins with, [C].
        shared: how many of them, 0 where a chain shares nothing, [C].

    Returns:
        (offsets [N + 1] int64, ids int32).
    """
    length = np.zeros(len(root), np.int64)
    np.maximum.at(length, chain, blocks)
    shared = np.minimum(shared, length[root])
    own = np.maximum(length - shared, 0)
    base = np.cumsum(own) - own - shared  # id of block k is base + k from k = shared on
    offsets = row_offsets(blocks)
    k = np.arange(offsets[-1], dtype=np.int32) - np.repeat(offsets[:-1].astype(np.int32), blocks)
    repeated = np.repeat(chain, blocks)
    ids = k + np.where(k < shared[repeated], base[root][repeated], base[repeated]).astype(np.int32)
    return offsets, ids


def row_offsets(counts: np.ndarray) -> np.ndarray:
    """Offsets [N + 1] of rows that hold `counts` ids each."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def take_rows(offsets: np.ndarray, ids: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ragged rows `rows`, in that order."""
    counts = np.diff(offsets)[rows]
    taken = row_offsets(counts)
    where = np.arange(taken[-1]) + np.repeat(offsets[:-1][rows] - taken[:-1], counts)
    return taken, ids[where]


def dense(ids: np.ndarray) -> np.ndarray:
    """The same ids renumbered 0..U-1 in their order, int32."""
    _, renumbered = np.unique(ids, return_inverse=True)
    return renumbered.astype(np.int32)
