"""KV in host memory: where preempted requests wait.

A run of neighbouring host blocks, at most `group` of them, is gathered on the device and then copied layer by
layer, keys and values apart: 2 x layers copies, as the cluster model counts them. With a group of 1 these are
vLLM 0.x's copies of single blocks, else FastSwitch's of block groups (arXiv 2411.18424). On CUDA host memory
is pinned, and copies run on a stream of their own, beside the next iteration where it need not wait for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch

from servegym.errors import InputError
from servegym.runtime.engine.memory import Blocks


class SwapSpace:
    """Host blocks of one instance and the copies to and from them; `scheduler.Mover`.

    Args:
        cache: the instance's KV, [layers, 2, blocks, block_tokens, kv_heads, head_dim].

    Attributes:
        halves: keys and values of each layer, [2 x layers, blocks, block_tokens, kv_heads, head_dim].
        settled: on CUDA, the moment from which the blocks of all swaps so far may be overwritten.

    Raises:
        InputError: host memory that cannot be had.
    """

    def __init__(self, cache: torch.Tensor, host_blocks: int, group: int) -> None:
        self.halves, self.group = cache.flatten(0, 1), group
        shape = (len(self.halves), host_blocks, *self.halves.shape[2:])
        try:
            self.host = torch.empty(shape, dtype=cache.dtype, pin_memory=cache.is_cuda and host_blocks > 0)
            self.host.zero_()
        except RuntimeError as error:
            raise InputError("engine", "swap_gib", host_blocks, "so many blocks cannot be pinned") from error
        self.side = torch.cuda.Stream(cache.device) if cache.is_cuda else None
        self.settled: torch.cuda.Event | None = None

    def out(self, blocks: Blocks, host: Blocks) -> None:
        """Device to host; the blocks may be overwritten by what this thread computes next."""
        for at, run in self._runs(host):
            staged = self.halves.index_select(1, self._ids(blocks[at]))
            with self._beside(staged):
                _copy_halves(staged, self.host[:, run])
        self._settle()

    def back(self, host: Blocks, blocks: Blocks) -> None:
        """Host to device; what this thread computes next waits for it."""
        for at, run in self._runs(host):
            stored = self.host[:, run]
            with self._beside():
                staged = torch.empty(stored.shape, dtype=stored.dtype, device=self.halves.device)
                _copy_halves(stored, staged)
            self._wait(staged)
            self.halves.index_copy_(1, self._ids(blocks[at]), staged)
        self._settle()

    def _runs(self, host: Blocks) -> Iterator[tuple[slice, slice]]:
        """Runs of neighbours in `host`: where in the sequence, and which host blocks."""
        start = 0
        for at in range(1, len(host) + 1):
            if at == len(host) or host[at] != host[at - 1] + 1 or at - start == self.group:
                yield slice(start, at), slice(host[start], host[start] + at - start)
                start = at

    def _ids(self, blocks: Blocks) -> torch.Tensor:
        return torch.as_tensor(blocks, dtype=torch.int64).to(self.halves.device)

    def _beside(self, *read: torch.Tensor) -> AbstractContextManager:
        """Copies inside run on the side stream, after what this thread has computed if they read it."""
        if not self.side:
            return nullcontext()
        for tensor in read:
            self.side.wait_stream(torch.cuda.current_stream())
            tensor.record_stream(self.side)
        return torch.cuda.stream(self.side)

    def _wait(self, written: torch.Tensor) -> None:
        """What this thread computes next comes after the copies so far."""
        if self.side:
            torch.cuda.current_stream().wait_stream(self.side)
            written.record_stream(torch.cuda.current_stream())

    def _settle(self) -> None:
        if self.side:
            self.settled = torch.cuda.current_stream().record_event()


def _copy_halves(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy a run of blocks, one copy for each half of each layer."""
    for here, there in zip(source, target, strict=True):
        there.copy_(here, non_blocking=True)
