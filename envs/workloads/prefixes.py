"""Chained prefix-block ids as ragged arrays: row i owns ids[offsets[i]:offsets[i + 1]]."""

from __future__ import annotations

import numpy as np
import pyarrow as pa


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


def take_rows(
    offsets: np.ndarray, ids: np.ndarray, rows: np.ndarray, counts: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The ragged rows `rows`, in that order; only their first `counts` ids where counts are given."""
    counts = np.diff(offsets)[rows] if counts is None else counts
    taken = row_offsets(counts)
    where = np.arange(taken[-1]) + np.repeat(offsets[:-1][rows] - taken[:-1], counts)
    return taken, ids[where]


def dense(ids: np.ndarray) -> np.ndarray:
    """The same ids renumbered 0..U-1 in the order of their first appearance, int32."""
    return pa.array(ids).dictionary_encode().indices.to_numpy()


def extend_over_outputs(
    offsets: np.ndarray, ids: np.ndarray, next_row: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Lengthen rows to `counts` ids with those of the rows that continue them.

    Args:
        offsets: [N + 1].
        ids: chained ids of the prompts' full blocks.
        next_row: row that continues each row's context, -1 for none, [N].
        counts: ids that each row should have, [N]; heeded where they are more than its own.
    """
    own = np.diff(offsets)
    counts = np.where(next_row >= 0, np.minimum(counts, own[next_row]), own)
    longer = counts > own
    # ids are chained, so the last one of a prompt tells whether the next row begins with all of it
    tail = np.where(own > 0, offsets[1:] - 1, 0)
    next_tail = np.where(longer, offsets[:-1][next_row] + own - 1, 0)
    longer &= (own == 0) | (ids[tail] == ids[next_tail]) if len(ids) else False
    source = np.where(longer, next_row, np.arange(len(own)))
    return take_rows(offsets, ids, source, np.where(longer, counts, own))


def continued_rows(offsets: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Row that each row continues, or -1: the latest earlier one, of two blocks or more, that it begins with.

    Args:
        offsets: [N + 1].
        ids: chained ids of the prompts' full blocks, so that an id stands for all before it.
    """
    latest: dict[int, int] = {}  # last block of a prompt -> the latest row that ends with it
    parent = np.full(len(offsets) - 1, -1)
    for row in range(len(parent)):
        blocks = ids[offsets[row] : offsets[row + 1]].tolist()
        parent[row] = max((latest.get(block, -1) for block in blocks[1:]), default=-1)
        if len(blocks) > 1:
            latest[blocks[-1]] = row
    return parent
