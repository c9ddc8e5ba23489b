"""KV in host memory: where preempted requests wait.

A copy takes a run of neighbouring host blocks, at most `group` of them: the blocks are gathered on the device
and travel together, as FastSwitch's block groups do (arXiv 2411.18424). With a group of 1 every block goes
layer by layer, keys and values apart, 2 x layers copies a block, as in vLLM 0.x. On CUDA host memory is
pinned, and copies run on a stream of their own, beside the next iteration where it need not wait for them.
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
        gathered: on CUDA, the moment from which blocks that have gone out may be overwritten.

    Raises:
        InputError: host memory that cannot be had.
    """

    def __init__(self, cache: torch.Tensor, host_blocks: int, group: int) -> None:
        self.cache, self.group = cache, group
        self.by_block = cache.permute(2, 0, 1, 3, 4, 5)
        shape = (host_blocks, *self.by_block.shape[1:])
        try:
            self.host = torch.empty(shape, dtype=cache.dtype, pin_memory=cache.is_cuda and host_blocks > 0)
            self.host.zero_()
        except RuntimeError as error:
            raise InputError("engine", "swap_gib", host_blocks, "so many blocks cannot be pinned") from error
        self.side = torch.cuda.Stream(cache.device) if cache.is_cuda else None
        self.gathered: torch.cuda.Event | None = None

    def out(self, blocks: Blocks, host: Blocks) -> None:
        """Device to host; the blocks may be overwritten by what this thread computes next."""
        if self.group == 1:
            self._fragments(blocks, host, outward=True)
        else:
            for at, run in self._runs(host):
                ids = self._ids(blocks[at])
                if not self.side:
                    torch.index_select(self.by_block, 0, ids, out=self.host[run])
                    continue
                staged = self.by_block[ids]
                with self._beside(staged):
                    self.host[run].copy_(staged, non_blocking=True)
        if self.side:
            self.gathered = torch.cuda.current_stream().record_event()

    def back(self, host: Blocks, blocks: Blocks) -> None:
        """Host to device; what this thread computes next waits for it."""
        if self.group == 1:
            self._fragments(blocks, host, outward=False)
            return
        for at, run in self._runs(host):
            with self._beside():
                staged = self.host[run].to(self.cache.device, non_blocking=True)
            self._wait(staged)
            self.by_block[self._ids(blocks[at])] = staged

    def _fragments(self, blocks: Blocks, host: Blocks, *, outward: bool) -> None:
        with self._beside(self.cache):
            for block, place in zip(blocks, host, strict=True):
                for layer, stored in zip(self.cache, self.host[place], strict=True):
                    for half, kept in zip(layer, stored, strict=True):
                        source, target = (half[block], kept) if outward else (kept, half[block])
                        target.copy_(source, non_blocking=True)
        self._wait()

    def _runs(self, host: Blocks) -> Iterator[tuple[slice, slice]]:
        """Runs of neighbours in `host`: where in the sequence, and which host blocks."""
        start = 0
        for at in range(1, len(host) + 1):
            if at == len(host) or host[at] != host[at - 1] + 1 or at - start == self.group:
                yield slice(start, at), slice(host[start], host[start] + at - start)
                start = at

    def _ids(self, blocks: Blocks) -> torch.Tensor:
        return torch.as_tensor(blocks, dtype=torch.int64).to(self.cache.device)

    def _beside(self, *read: torch.Tensor) -> AbstractContextManager:
        """Copies inside run on the side stream, after what this thread has computed if they read it."""
        if not self.side:
            return nullcontext()
        for tensor in read:
            self.side.wait_stream(torch.cuda.current_stream())
            tensor.record_stream(self.side)
        return torch.cuda.stream(self.side)

    def _wait(self, *written: torch.Tensor) -> None:
        """What this thread computes next comes after the copies so far."""
        if self.side:
            torch.cuda.current_stream().wait_stream(self.side)
            for tensor in written:
                tensor.record_stream(torch.cuda.current_stream())
