"""Live migration in the reference simulator: one decoding request on its way to another instance (Llumnix).

Copies of full blocks run while the request goes on decoding. When a copy ends with few enough new blocks,
the request stops at its instance's next boundary and the rest follows in one last copy; then it joins the
batch of its destination. Memory there is reserved copy by copy.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from servegym.envs.cluster.reference_instance import Instance, Request


class Phase(Enum):
    """Where a migration stands: a live copy, waiting for the source's next boundary, the last copy."""

    LIVE, STOPPING, LAST = range(3)


class Migration:
    """A migration in flight; both of its instances are engaged until it is committed or aborted."""

    def __init__(
        self, request: Request, source: Instance, target: Instance, last_blocks: int, stages: int
    ) -> None:
        self.request, self.source, self.target = request, source, target
        self.last_blocks, self.stages = last_blocks, stages
        self.phase, self.stage = Phase.LIVE, 1
        self.copied = 0  # tokens of KV, with the copy in flight
        self.until: int | None = None  # end of the copy in flight
        source.out = target.inbound = self

    def full_blocks(self) -> int:
        """Tokens of KV that stand in full blocks of the source."""
        size = self.source.block_tokens
        return self.request.computed // size * size

    def begin(self, now: int) -> None:
        """The first copy starts; whoever starts a migration has seen that its blocks fit."""
        self.reserve(self.full_blocks())
        self.copy(now, self.full_blocks())

    def reserve(self, tokens: int) -> bool:
        """Hold blocks for so many tokens at the destination, if they fit beside its watermark."""
        extra = self.target.blocks_of(tokens) - self.target.reserved
        if extra > self.target.free - self.target.watermark:
            return False
        self.target.reserved += extra
        self.target.evict()
        return True

    def copy(self, now: int, tokens: int) -> None:
        """Copy what is missing up to `tokens` tokens, once the links of both instances are free."""
        source, target = self.source, self.target
        blocks = source.blocks_of(tokens) - self.copied // source.block_tokens
        start = max(now, source.link_until, target.link_until)
        self.until = start + source.net_call + source.net_block * blocks
        source.link_until = target.link_until = self.until
        self.copied = tokens

    def end_copy(self, now: int) -> None:
        """The copy in flight has ended."""
        self.until = None
        if self.phase is Phase.LAST:
            self.commit(now)
            return
        size = self.source.block_tokens
        new_blocks = self.source.blocks_of(self.request.computed) - self.copied // size
        if new_blocks <= self.last_blocks:
            self.phase = Phase.STOPPING
        elif self.stage == self.stages or not self.reserve(self.full_blocks()):
            self.abort(now)
        else:
            self.stage += 1
            self.copy(now, self.full_blocks())

    def boundary(self, now: int) -> None:
        """An iteration of the source has ended: a request that is stopping leaves its batch."""
        if self.phase is not Phase.STOPPING:
            return
        if not self.reserve(self.request.computed):
            self.abort(now)
            return
        self.phase = Phase.LAST
        self.source.running.remove(self.request)
        self.copy(now, self.request.computed)

    def commit(self, now: int) -> None:
        """The request has arrived: the source forgets it, the destination lets it join when it can."""
        self.source.drop_kv(self.request)
        self.request.instance = self.target.number
        self.request.migrations += 1
        self.target.joiner = self.request
        self.source.out = self.target.inbound = None
        self.source.kick(now)
        self.target.kick(now)

    def abort(self, now: int) -> None:
        """Give up: the reserved blocks are free again, and the request goes on where it is."""
        self.target.reserved = 0
        self.source.out = self.target.inbound = None
        self.target.kick(now)
