"""CUDA graphs of decode iterations, one for each padded batch size: a launch instead of hundreds.

All sizes read the same inputs, of which a smaller one takes the first rows, and keep nothing but their next
tokens: tables and logits of their own would be gigabytes where many requests run.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from servegym.runtime.engine.batch import Batch
from servegym.runtime.engine.model import Transformer

_COPIED = ("tokens", "positions", "slots", "lengths")  # of a batch, row by row


class _Captured(NamedTuple):
    inputs: Batch
    graph: torch.cuda.CUDAGraph
    tokens: torch.Tensor


class DecodeGraphs:
    """Captured decode iterations of one instance.

    Args:
        cache: the instance's KV; rows that fill a batch up write to its last block. The current stream is the
            instance's.
        width: blocks of the longest request.
    """

    def __init__(self, model: Transformer, cache: torch.Tensor, max_seqs: int, width: int) -> None:
        self.spare, self.block_tokens = cache.shape[2] - 1, cache.shape[3]
        sizes = {min(size, max_seqs) for size in (1, 2, 4, *range(8, max_seqs, 8), max_seqs)}
        self.captured: dict[int, _Captured] = {}
        whole = self._inputs(max_seqs, width, cache.device)
        pool, stream = None, torch.cuda.current_stream(cache.device)
        for size in sorted(sizes, reverse=True):  # the largest shares its memory
            inputs = first_rows(whole, size)
            model.next_tokens(inputs, cache)  # compiles kernels, which a capture cannot
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # On the instance's own stream: cuBLAS keeps a workspace a stream, and graphs captured on torch's
            # default for it would share one with those of instances that run at the same time.
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                tokens = model.next_tokens(inputs, cache)
            pool = pool or graph.pool()
            self.captured[size] = _Captured(inputs, graph, tokens)

    def run(self, batch: Batch) -> torch.Tensor:
        """Next tokens of a batch that only decodes, int64 [S]; valid until the next call."""
        n = len(batch.tables)
        inputs, graph, tokens = self.captured[min(size for size in self.captured if size >= n)]
        for name in _COPIED:
            getattr(inputs, name)[:n].copy_(getattr(batch, name))
        inputs.tables[:n, : batch.tables.shape[1]].copy_(batch.tables)
        inputs.slots[n:].fill_(self.spare * self.block_tokens)
        inputs.lengths[n:].fill_(1)
        graph.replay()
        return tokens[:n]

    def _inputs(self, size: int, width: int, device: torch.device) -> Batch:
        return Batch(
            tokens=torch.zeros(size, dtype=torch.int64, device=device),
            positions=torch.zeros(size, dtype=torch.int64, device=device),
            slots=torch.full((size,), self.spare * self.block_tokens, dtype=torch.int64, device=device),
            tables=torch.full((size, width), self.spare, dtype=torch.int64, device=device),
            lengths=torch.ones(size, dtype=torch.int32, device=device),
            mask=None,
            last=torch.arange(size, device=device),
        )


def first_rows(batch: Batch, n: int) -> Batch:
    """The first n requests of a batch that only decodes, in the same memory."""
    return replace(batch, **{name: getattr(batch, name)[:n] for name in (*_COPIED, "tables", "last")})
