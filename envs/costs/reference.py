"""The cost model one iteration at a time, in plain Python, to be read and to be compared with.

`model.py` computes the same numbers in numba and whole decode stretches in closed form.
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np

from servegym.envs.costs.tables import CostTables


class ReferenceCosts:
    """Costs of single iterations in picoseconds, from the same integer tables."""

    def __init__(self, tables: CostTables) -> None:
        self.tables = tables

    def iteration_ps(
        self, profile_index: int, decode_contexts: list[int], chunks: list[tuple[int, int]]
    ) -> int:
        """One iteration: one token for each of `decode_contexts`, and prefill `chunks`.

        Args:
            profile_index: row of the tables.
            decode_contexts: KV tokens that each decoding request reads.
            chunks: (new tokens, earlier tokens that they attend to) of each prefilling request.
        """
        p = profile_index
        chunk_tokens = sum(chunk for chunk, _ in chunks)
        linear = int(self.tables.linear[p, len(decode_contexts) + chunk_tokens])
        head = int(self.tables.head[p, len(decode_contexts) + len(chunks)])
        if not chunks:
            return linear + head + self.decode_ps(p, decode_contexts)
        prefill = sum(self.prefill_ps(p, chunk, past) for chunk, past in chunks)
        longest = max(chunk for chunk, _ in chunks)
        chunked = int(self.tables.chunked[p])
        return linear + head + chunked + prefill + self.mixed_ps(p, decode_contexts, longest)

    def decode_ps(self, p: int, contexts: list[int]) -> int:
        """Attention of one new token for each context: by batch and mean context, plus the skew."""
        t = self.tables
        return self._decodes(p, contexts, t.decode_base, t.decode_slope, t.decode_skew)

    def mixed_ps(self, p: int, contexts: list[int], longest: int) -> int:
        """The same beside prefill chunks; each pair of a decode and a token of the longest adds to it."""
        t = self.tables
        launch = int(t.mixed_launch[p]) * len(contexts) * longest
        return launch + self._decodes(p, contexts, t.mixed_base, t.mixed_slope, t.mixed_skew)

    def _decodes(
        self, p: int, contexts: list[int], base: np.ndarray, slope: np.ndarray, skew: np.ndarray
    ) -> int:
        n = len(contexts)
        if n == 0:
            return 0
        knots = self.tables.decode_knot[p].tolist()
        mean = sum(contexts) // n
        j = bisect_right(knots, mean) - 1
        beyond = sum(contexts) - n * knots[j]
        return int(base[p, n, j]) + int(slope[p, n, j]) * beyond + int(skew[p, n]) * (max(contexts) - mean)

    def prefill_ps(self, p: int, chunk: int, past: int) -> int:
        """Attention of one prefill chunk: linear along the past on both chunk knots, then along the chunk."""
        chunks, pasts = self.tables.chunk_knot[p].tolist(), self.tables.past_knot[p].tolist()
        a = min(bisect_right(chunks, chunk) - 1, len(chunks) - 2)
        b = min(bisect_right(pasts, past) - 1, len(pasts) - 2)
        table = self.tables.prefill[p].tolist()
        low, high = (
            _between(past, pasts[b], pasts[b + 1], table[row][b], table[row][b + 1]) for row in (a, a + 1)
        )
        return _between(chunk, chunks[a], chunks[a + 1], low, high)


def _between(x: int, x_0: int, x_1: int, y_0: int, y_1: int) -> int:
    """The line through two points at x, rounded down after the multiplication."""
    return y_0 + (y_1 - y_0) * (x - x_0) // (x_1 - x_0)
