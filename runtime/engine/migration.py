"""Live migration of a decoding request between two instances (Llumnix, OSDI'24).

Copies of full blocks run while the request goes on decoding. When a copy ends with few enough new blocks,
the request stops at its instance's next boundary and the rest follows in one last copy; then it joins the
batch of its destination. Memory there is taken copy by copy. The rules are those of
`servegym.envs.cluster.reference_migration`.

Whoever calls holds the lock of the cluster; copies run beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Protocol

from servegym.runtime.engine.request import Request
from servegym.runtime.engine.scheduler import Scheduler


class Phase(Enum):
    """Where a migration stands: a live copy, waiting for the source's next boundary, the last copy, over."""

    LIVE, STOPPING, LAST, COMMITTED, ABORTED = range(5)


class Copier(Protocol):
    """Copies of KV blocks between instances."""

    def start(self, migration: Migration, blocks: Sequence[int], to: Sequence[int]) -> None:
        """Copy blocks of the source to blocks of the target; `migration.end_copy` follows when done."""

    def cancel(self, migration: Migration) -> None:
        """Return once no copy of this migration runs, and never call its `end_copy` again."""


class Migration:
    """A migration; both of its instances are engaged until it is committed or aborted.

    Args:
        last_blocks: when so few blocks are left to copy, the request stops and they go in one last copy.
        stages: live copies after which the migration is given up.

    Attributes:
        stopped_s: when the request stopped at the source; NaN before.
    """

    def __init__(
        self,
        request: Request,
        source: Scheduler,
        target: Scheduler,
        copier: Copier,
        last_blocks: int,
        stages: int,
    ) -> None:
        self.request, self.source, self.target, self.copier = request, source, target, copier
        self.last_blocks, self.stages = last_blocks, stages
        self.phase, self.stage = Phase.LIVE, 1
        self.copied = 0  # blocks, with the copy in flight
        self.stopped_s = float("nan")
        source.out = target.inbound = self

    def full_blocks(self) -> int:
        """Full blocks of the request at the source."""
        return self.request.computed // self.source.setting.block_tokens

    def begin(self) -> None:
        """The first copy starts; whoever starts a migration has seen that its blocks fit."""
        self._reserve(self.full_blocks())
        self._copy(self.full_blocks())

    def end_copy(self) -> None:
        """The copy in flight has ended."""
        if self.phase is Phase.LAST:
            self._commit()
            return
        left = self.source.memory.blocks_of(self.request.computed) - self.copied
        if left <= self.last_blocks:
            self.phase = Phase.STOPPING
        elif self.stage == self.stages or not self._reserve(self.full_blocks()):
            self.abort()
        else:
            self.stage += 1
            self._copy(self.full_blocks())

    def boundary(self, now_s: float) -> None:
        """An iteration of the source has ended: a request that is stopping leaves its batch."""
        if self.phase is not Phase.STOPPING:
            return
        blocks = self.source.memory.blocks_of(self.request.computed)
        if not self._reserve(blocks):
            self.abort()
            return
        self.phase, self.stopped_s = Phase.LAST, now_s
        self.source.running.remove(self.request)
        self._copy(blocks)

    def abort(self) -> None:
        """Give up: the reserved blocks are free again, and the request goes on where it is."""
        self.copier.cancel(self)
        self.target.memory.give(self.target.reserved)
        self.target.reserved = []
        self._over(Phase.ABORTED)

    def _reserve(self, blocks: int) -> bool:
        """Take so many blocks at the destination, if they fit beside its watermark."""
        memory = self.target.memory
        extra = blocks - len(self.target.reserved)
        if extra > memory.free - self.target.setting.watermark:
            return False
        self.target.reserved += memory.take(max(extra, 0))
        return True

    def _copy(self, blocks: int) -> None:
        """Copy what is missing of the request's first blocks."""
        span = slice(self.copied, blocks)
        self.copied = blocks
        self.copier.start(self, self.request.table[span], self.target.reserved[span])

    def _commit(self) -> None:
        """The request has arrived: the source forgets it, the destination lets it join when it can."""
        self.source.memory.drop(self.request)
        self.request.instance = self.target.number
        self.request.migrations += 1
        self.target.joiner = self.request
        self._over(Phase.COMMITTED)

    def _over(self, phase: Phase) -> None:
        self.phase = phase
        self.source.out = self.target.inbound = None
        self.source.kick()
        self.target.kick()
