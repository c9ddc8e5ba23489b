"""Copies of KV between instances on a thread of its own, one after the other as over one link."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Lock, RLock, Thread
from typing import NamedTuple

import torch

from servegym.runtime.engine.instance import Instance
from servegym.runtime.engine.memory import Blocks
from servegym.runtime.engine.migration import Migration, Phase


class _Job(NamedTuple):
    migration: Migration
    blocks: torch.Tensor
    to: torch.Tensor


class BlockCopier:
    """`migration.Copier` for instances of one process.

    Args:
        failed: told what stopped the thread; migrations would wait for ever.

    Attributes:
        downtimes: blocks of each migration, and seconds from the stop at its source until all its KV was at
            its target.
    """

    def __init__(
        self, instances: Sequence[Instance], lock: RLock, failed: Callable[[BaseException], None]
    ) -> None:
        self.instances, self.lock, self.failed = instances, lock, failed
        self.downtimes: list[tuple[int, float]] = []
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._busy = Lock()
        self._thread = Thread(target=self._work, name="copier", daemon=True)
        self._thread.start()

    def start(self, migration: Migration, blocks: Blocks, to: Blocks) -> None:
        """Queue a copy; the tables may change before its turn comes."""
        source, target = (torch.tensor(ids, dtype=torch.int64) for ids in (blocks, to))
        self._jobs.put(_Job(migration, source, target))

    def cancel(self, migration: Migration) -> None:
        """Wait for a copy that runs; what is queued finds its migration aborted."""
        migration.phase = Phase.ABORTED
        with self._busy:
            pass

    def close(self) -> None:
        """Let the thread end after what is queued."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                self._copy(*job)
        except BaseException as error:
            self.failed(error)

    def _copy(self, migration: Migration, blocks: torch.Tensor, to: torch.Tensor) -> None:
        with self._busy:
            if migration.phase is not Phase.ABORTED:
                source, target = (self.instances[s.number] for s in (migration.source, migration.target))
                copy_blocks(source, target, blocks, to)
        with self.lock:
            if migration.phase is not Phase.ABORTED:
                migration.end_copy()
            if migration.phase is Phase.COMMITTED:
                down = time.perf_counter() - migration.stopped_s
                self.downtimes.append((migration.copied, down))


@torch.inference_mode()
def copy_blocks(source: Instance, target: Instance, blocks: torch.Tensor, to: torch.Tensor) -> None:
    """Copy blocks of one instance to blocks of another: gathered, then scattered; returns when it is done."""
    here, there, side = source.swap.halves, target.swap.halves, source.copies
    if side is None:  # on the CPU
        for mine, theirs in zip(here, there, strict=True):
            theirs.index_copy_(0, to, mine.index_select(0, blocks))
        return
    # A request may still be on its way into the source's blocks, out of the target's, or into some that it
    # has given up since.
    for settled in (source.swap.settled, target.swap.settled):
        if settled:
            side.wait_event(settled)
    with torch.cuda.stream(side):
        there.index_copy_(1, to.to(there.device), here.index_select(1, blocks.to(here.device)))
    side.synchronize()
