"""The scheduler of one instance: the rules of the cluster model, over real blocks.

`servegym.envs.cluster.reference_instance` is the same in simulated time; a property test holds the two
together, decision by decision. An iteration takes, under a token budget,

1. every decoding request, one token each, and the one prompt that is partly computed, as many tokens as the
   budget leaves. While their blocks do not fit, a running request gives way: the last admitted under FCFS,
   the largest (priority, arrival) under priorities, or whom `choose_victim` names.
2. the request that has migrated here, if its next token fits.
3. if nobody gave way: waiting requests in order, while there is budget, a free sequence and room for their
   blocks; the first that does not fit stops the admission.

Whoever calls holds the lock of the cluster. Nothing here knows torch: data moves through the `Mover`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from servegym.envs.cluster.settings import Setting
from servegym.errors import InputError
from servegym.runtime.engine.memory import Memory
from servegym.runtime.engine.request import Request

if TYPE_CHECKING:
    from servegym.runtime.engine.migration import Migration

Plan = list[tuple[Request, int]]  # requests of an iteration with their new tokens


class Mover(Protocol):
    """Copies of KV blocks between device and host."""

    def out(self, blocks: Sequence[int], host: Sequence[int]) -> None:
        """Device to host, before anything that is computed later overwrites the blocks."""

    def back(self, host: Sequence[int], blocks: Sequence[int]) -> None:
        """Host to device, before anything that is computed later reads the blocks."""


class Scheduler:
    """Waiting requests, running requests and KV blocks of one instance.

    Args:
        setting: the instance's settings.
        unit_tokens: tokens of a prefix unit; 0 for no prefix cache.
        choose_victim: who of several running requests gives way, and whether by swap; None: the default.
        kick: called when something has changed that may let an idle instance run.

    Raises:
        InputError: asynchronous scheduling, or prefix units that are no whole number of blocks.
    """

    def __init__(
        self,
        setting: Setting,
        mover: Mover,
        number: int = 0,
        unit_tokens: int = 0,
        choose_victim: Callable[[list[Request]], tuple[Request, bool] | None] = lambda _: None,
        kick: Callable[[], None] = lambda: None,
    ) -> None:
        if setting.asynchronous:
            raise InputError("engine", "async_scheduling", True, "this runtime schedules between iterations")
        unit_tokens = unit_tokens if setting.caching else 0
        if unit_tokens % setting.block_tokens:
            hint = f"must be a multiple of the KV block of {setting.block_tokens} tokens"
            raise InputError("engine", "prefix_block_tokens", unit_tokens, hint)
        self.setting, self.number, self.mover = setting, number, mover
        self.choose_victim, self.kick = choose_victim, kick
        self.memory = Memory(setting.blocks, setting.block_tokens, unit_tokens)
        self.host_empty = list(range(setting.host_blocks))
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission
        self.batch: Plan = []  # the iteration in flight
        self.cap = setting.budget  # most prompt tokens of an iteration
        self.out: Migration | None = None
        self.inbound: Migration | None = None
        self.joiner: Request | None = None  # has migrated to here and is not in the batch yet
        self.reserved: list[int] = []  # blocks for the request of `inbound`, then for the joiner
        self.preemptions = self.admissions = 0

    @staticmethod
    def order(r: Request) -> tuple[int, float, int]:
        """Key by which priorities schedule: the smallest first."""
        return (r.priority, r.arrived_s, r.number)

    def enqueue(self, r: Request, *, front: bool = False) -> None:
        """Put a request on the waiting list."""
        r.instance = self.number
        if front:
            self.waiting.appendleft(r)
        else:
            self.waiting.append(r)
        if self.setting.by_priority:
            self.waiting = deque(sorted(self.waiting, key=self.order))
        self.kick()

    # --- an iteration -----------------------------------------------------------------------------------

    def schedule(self) -> Plan:
        """Choose the next iteration and give it its blocks; empty where nothing can run."""
        plan, preempted = self._make_room()
        decodes = sum(r.decoding for r in self.running)
        budget = min(self.setting.budget, self.cap + decodes)
        for r, new in plan:
            self.memory.grow(r, r.computed + new)
        for r, new in plan:
            if not r.decoding:
                self.memory.publish(r, r.computed + new)
        self._join(plan, budget)
        if not preempted:
            self._admit(plan, budget)
        self.batch = plan
        return plan

    def complete(self, tokens: Sequence[int], now_s: float) -> list[Request]:
        """The iteration in flight has ended with these next tokens; returns the requests that are done."""
        done = []
        for (r, new), token in zip(self.batch, tokens, strict=True):
            r.computed += new
            if r.computed == r.tokens:
                r.stream(token, now_s)
                if r.streamed == r.output:
                    r.finished_s = now_s
                    done.append(r)
        self.batch = []
        done.sort(key=lambda r: r.number)
        for r in done:
            self.running.remove(r)
            if self.out and self.out.request is r:
                self.out.abort()
        if self.out:
            self.out.boundary(now_s)
        for r in done:
            self.memory.drop(r)
        return done

    def _make_room(self) -> tuple[Plan, bool]:
        """New tokens of the running requests, decodes first, after as many have given way as must."""
        preempted = False
        while True:
            plan = [(r, 1) for r in self.running if r.decoding]
            most = min(self.cap, self.setting.budget - len(plan))
            if len(plan) < len(self.running):
                plan += [(r, min(r.tokens - r.computed, most)) for r in self.running if not r.decoding]
            size = self.setting.block_tokens
            need = sum(-(-(r.computed + new) // size) - r.blocks for r, new in plan)
            if need <= self.memory.free:
                return plan, preempted
            self.preempt(*self._victim())
            preempted = True

    def _join(self, plan: Plan, budget: int) -> None:
        """The request that has migrated to here computes its next token, behind the KV that it brought.

        `_seats` has kept a sequence for it since its migration began.
        """
        r = self.joiner
        if r is None or sum(new for _, new in plan) == budget:
            return
        if self.memory.blocks_of(r.tokens) - len(self.reserved) > self.memory.free:
            return
        r.table = self.memory.new_table(r)
        r.table[: len(self.reserved)], r.blocks = self.reserved, len(self.reserved)
        self.joiner, self.reserved = None, []
        self._run(r, plan, r.tokens - 1, 1)

    def _seats(self) -> int:
        """Sequences that waiting requests may still take; a request that migrates to here has its own."""
        return self.setting.max_seqs - len(self.running) - (1 if self.inbound or self.joiner else 0)

    def _admit(self, plan: Plan, budget: int) -> None:
        """Admit waiting requests in order, as long as they fit."""
        left = budget - sum(new for _, new in plan)
        while self.waiting and self._seats() > 0:
            r = self.waiting[0]
            found = self.memory.match(r.prefix_ids, r.tokens - 1)
            hits = len(found) * self.memory.unit_tokens
            past = max(hits, r.hosted)
            new = min(r.tokens - past, left)
            if new == 0 or not self._has_room(r, found, past + new):
                return
            self.waiting.popleft()
            self.memory.adopt(r, found)
            if r.hosted:
                self._fetch(r, hits)
            elif r.preemptions == 0:
                r.cached = past
            else:
                r.lost -= past
            self._run(r, plan, past, new)
            left -= new

    def _run(self, r: Request, plan: Plan, past: int, new: int) -> None:
        """Request r, whose first `past` tokens have KV, computes `new` more in the iteration planned."""
        r.computed = past
        r.admitted, self.admissions = self.admissions, self.admissions + 1
        self.running.append(r)
        self.memory.grow(r, past + new)
        self.memory.publish(r, past + new)
        plan.append((r, new))

    def _has_room(self, r: Request, found: list[int], tokens: int) -> bool:
        """Whether a waiting request's blocks fit beside the watermark."""
        memory = self.memory
        blocks = memory.blocks_of(r.tokens if self.setting.reserve else tokens)
        blocks -= sum(1 for key in found if memory.units[key].holders) * memory.unit_blocks
        return blocks <= memory.free - self.setting.watermark

    # --- preemption -------------------------------------------------------------------------------------

    def _victim(self) -> tuple[Request, bool]:
        """Who gives way, and whether by swap; only among several there is a choice."""
        answer = self.choose_victim(self.running) if len(self.running) > 1 else None
        worst = max(self.running, key=self.order) if self.setting.by_priority else self.running[-1]
        return answer or (worst, self.setting.by_swap)

    def preempt(self, r: Request, by_swap: bool) -> None:
        """A running request gives up its memory and waits again; its KV goes to the host or is lost."""
        if self.out and self.out.request is r:
            self.out.abort()
        self.running.remove(r)
        self.preemptions += 1
        r.preemptions += 1
        blocks = self.memory.blocks_of(r.computed)
        if by_swap and blocks <= len(self.host_empty):
            r.host_table, self.host_empty = self.host_empty[:blocks], self.host_empty[blocks:]
            self.mover.out(r.table[:blocks], r.host_table)
            r.hosted = r.computed
        else:
            r.lost += r.computed
        self.memory.drop(r)
        self.enqueue(r, front=True)

    def _fetch(self, r: Request, hits: int) -> None:
        """Copy back from the host what the prefix cache does not hold."""
        self.memory.grow(r, r.hosted)
        skip = self.memory.blocks_of(hits)
        if r.hosted > hits:
            blocks = self.memory.blocks_of(r.hosted)
            self.mover.back(r.host_table[skip:], r.table[skip:blocks])
        # In order, so that the next swap finds runs of neighbours, which go in one copy.
        self.host_empty = sorted(self.host_empty + r.host_table)
        r.hosted, r.host_table = 0, []

    # --- what a router asks -----------------------------------------------------------------------------

    def prefills_beside_decodes(self) -> bool:
        """Whether it decodes while prompts wait or are left over by the iteration in flight."""
        partial = any(r.computed + new < r.tokens for r, new in self.batch)
        return any(r.decoding for r in self.running) and (bool(self.waiting) or partial)

    def clear(self) -> None:
        """Forget all requests and everything that is cached."""
        if self.out:
            self.out.abort()
        if self.inbound:
            self.inbound.abort()
        kept = self.setting, self.mover, self.number, self.memory.unit_tokens, self.choose_victim, self.kick
        self.__init__(*kept)  # type: ignore[misc]
