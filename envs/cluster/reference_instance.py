"""One engine replica in the reference simulator: one iteration at a time, written to be read.

The rules are those of vLLM v1's scheduler; `engine.py` says which details are simplified.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from servegym.envs.cluster.reference_migration import Migration, Phase
from servegym.envs.costs.reference import ReferenceCosts


@dataclass(eq=False)
class Request:
    """A request and everything that happens to it; times in picoseconds, None until they are known."""

    number: int
    prompt: int
    output: int
    priority: int
    prefix_ids: list[int]
    next_turn: int
    gap_to_next: int = 0
    arrived: int | None = None
    dispatched: int | None = None
    instance: int = -1
    first: int | None = None
    finished: int | None = None
    last: int | None = None
    streamed: int = 0
    computed: int = 0
    blocks: int = 0
    shared: list[int] = field(default_factory=list)
    decoding: bool = False  # its prompt is computed: one token an iteration from now on
    max_gap: int = 0
    preemptions: int = 0
    migrations: int = 0
    cached: int = 0
    lost: int = 0
    hosted: int = 0  # tokens of KV that were swapped out to the host

    @property
    def tokens(self) -> int:
        """Tokens known so far; the last one streamed has no KV yet."""
        return self.prompt + self.streamed


class PrefixCache:
    """Chained prefix blocks of one instance; those that nobody holds are kept in order of last use."""

    def __init__(self, block_tokens: int, kv_blocks: int) -> None:
        self.block_tokens, self.kv_blocks = block_tokens, kv_blocks
        self.holders: dict[int, int] = {}
        self.idle: OrderedDict[int, None] = OrderedDict()

    def match(self, ids: list[int], tokens: int) -> list[int]:
        """The leading ids that are cached and end within `tokens`."""
        found = []
        for block, key in enumerate(ids):
            if key not in self.holders or (block + 1) * self.block_tokens > tokens:
                break
            found.append(key)
        return found

    def hold(self, key: int) -> None:
        """One more request uses a block."""
        self.idle.pop(key, None)
        self.holders[key] = self.holders.get(key, 0) + 1

    def release(self, key: int) -> None:
        """One request fewer uses a block."""
        self.holders[key] -= 1
        if self.holders[key] == 0:
            self.idle[key] = None

    def evict_one(self) -> None:
        """Forget the block that has been idle for longest."""
        key, _ = self.idle.popitem(last=False)
        del self.holders[key]


class Instance:
    """One engine replica: waiting requests, running requests and KV blocks.

    Args:
        number: its place in the fleet.
        setting, entry: its SETTING, and the EPISODE that is played.
        choose_victim: names the running request that gives way among several, and whether by swap; None
            leaves it to the engine.
    """

    def __init__(
        self,
        number: int,
        setting: np.void,
        entry: np.void,
        costs: ReferenceCosts,
        choose_victim: Callable[[int, list[Request]], tuple[Request, bool] | None],
    ) -> None:
        self.number = number
        self.profile = int(setting["profile"])
        self.capacity = int(setting["blocks"])
        self.block_tokens = int(setting["block_tokens"])
        self.budget, self.max_seqs = int(setting["budget"]), int(setting["max_seqs"])
        self.watermark = int(setting["watermark"])
        self.by_priority, self.reserve = bool(setting["by_priority"]), bool(setting["reserve"])
        self.asynchronous = bool(setting["asynchronous"])
        self.by_swap = bool(setting["by_swap"])
        self.swap_call, self.swap_block = int(setting["swap_call"]), int(setting["swap_block"])
        self.swap_group, self.overlap = int(setting["swap_group"]), int(setting["overlap"])
        self.net_call, self.net_block = int(setting["net_call"]), int(setting["net_block"])
        self.drain = int(setting["drain"])
        self.slowdown = int(entry["slowdown"])
        self.costs, self.choose_victim = costs, choose_victim
        prefix_tokens = int(entry["prefix_tokens"])
        caching = bool(setting["caching"]) and prefix_tokens > 0
        self.cache = PrefixCache(prefix_tokens, prefix_tokens // self.block_tokens) if caching else None
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission
        self.batch: list[tuple[Request, int]] = []  # requests in flight, with their new tokens
        self.leaving: list[Request] = []  # finished, but too late for the iteration that is chosen now
        self.begin = 0
        self.until: int | None = None
        self.cap = self.budget  # most prompt tokens of an iteration
        self.host_blocks = self.host_free = int(setting["host_blocks"])
        self.copying = 0  # time of the swaps that the next iteration waits for
        self.link_until = 0  # end of the last copy on the link that swaps and migrations share
        self.out: Migration | None = None
        self.inbound: Migration | None = None
        self.joiner: Request | None = None  # has migrated to here and is not in the batch yet
        self.reserved = 0  # blocks for the request of `inbound`, then for the joiner

    # --- memory -----------------------------------------------------------------------------------------

    def blocks_of(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // self.block_tokens)

    @property
    def room(self) -> int:
        """Tokens that it can hold when nothing else is there."""
        return (self.capacity - self.watermark) * self.block_tokens

    @property
    def free(self) -> int:
        """Blocks that nobody holds or has reserved; those of idle prefix blocks count as free."""
        shared = 0
        if self.cache:
            shared = sum(1 for holders in self.cache.holders.values() if holders) * self.cache.kv_blocks
        own = sum(self.own_blocks(r) for r in self.running + self.leaving + self.stopped)
        return self.capacity - shared - own - self.reserved

    @property
    def stopped(self) -> list[Request]:
        """The request whose last copy is on its way to another instance, while its blocks are still here."""
        return [self.out.request] if self.out and self.out.phase is Phase.LAST else []

    def own_blocks(self, r: Request) -> int:
        """Blocks that only this request holds."""
        return r.blocks - (len(r.shared) * self.cache.kv_blocks if self.cache else 0)

    def evict(self) -> None:
        """Drop idle prefix blocks until the rest fit into the free blocks."""
        while self.cache and len(self.cache.idle) * self.cache.kv_blocks > self.free:
            self.cache.evict_one()

    def publish(self, r: Request, tokens: int) -> None:
        """Share the prefix blocks that r has filled."""
        if self.cache:
            for key in r.prefix_ids[len(r.shared) : tokens // self.cache.block_tokens]:
                self.cache.hold(key)
                r.shared.append(key)

    def drop_kv(self, r: Request) -> None:
        """Request r lets go of all its KV."""
        self.publish(r, r.computed)
        if self.cache:
            for key in reversed(r.shared):
                self.cache.release(key)
        r.shared, r.blocks, r.computed, r.decoding = [], 0, 0, False

    # --- scheduling -------------------------------------------------------------------------------------

    @staticmethod
    def order(r: Request) -> tuple[int, int, int]:
        """Key by which priorities schedule: the smallest first."""
        assert r.arrived is not None
        return (r.priority, r.arrived, r.number)

    def enqueue(self, r: Request, *, front: bool = False) -> None:
        """Put a request on the waiting list."""
        if front:
            self.waiting.appendleft(r)
        else:
            self.waiting.append(r)
        if self.by_priority:
            self.waiting = deque(sorted(self.waiting, key=self.order))

    def kick(self, now: int) -> None:
        """Something has changed: if nothing is in flight, an empty iteration ends now, which schedules."""
        if self.until is None:
            self.batch, self.begin, self.until = [], now, now

    def victim(self) -> tuple[Request, bool]:
        """Who gives way, and whether by swap; only among several there is a choice."""
        answer = self.choose_victim(self.number, self.running) if len(self.running) > 1 else None
        worst = max(self.running, key=self.order) if self.by_priority else self.running[-1]
        return answer or (worst, self.by_swap)

    def preempt(self, r: Request, by_swap: bool, now: int) -> None:
        """A running request gives up its memory and waits again; its KV goes to the host or is lost."""
        if self.out and self.out.request is r:
            self.out.abort(now)
        self.running.remove(r)
        r.preemptions += 1
        blocks = self.blocks_of(r.computed)
        if by_swap and blocks <= self.host_free:
            self.host_free -= blocks
            self.copying += self.swap_ps(blocks)
            r.hosted = r.computed
        else:
            r.lost += r.computed
        self.drop_kv(r)
        self.enqueue(r, front=True)

    def swap_ps(self, blocks: int) -> int:
        """Time to copy so many blocks of a request between device and host."""
        return self.swap_call * -(-blocks // self.swap_group) + self.swap_block * blocks

    def plan_running(self) -> list[tuple[Request, int]]:
        """New tokens of the running requests: decodes first, then what the budget leaves to the prompt."""
        plan = [(r, 1) for r in self.running if r.decoding]
        most = min(self.cap, self.budget - len(plan))
        return plan + [(r, min(r.tokens - r.computed, most)) for r in self.running if not r.decoding]

    def schedule(self, now: int, seen: int) -> None:
        """Choose the next iteration from the requests that had arrived by `seen`."""
        preempted = False
        while True:
            plan = self.plan_running()
            need = sum(self.blocks_of(r.computed + new) - r.blocks for r, new in plan)
            if need <= self.free:
                break
            self.preempt(*self.victim(), now)
            preempted = True
        budget = min(self.budget, self.cap + sum(r.decoding for r in self.running))
        for r, new in plan:
            r.blocks = self.blocks_of(r.computed + new)
        self.evict()
        for r, new in plan:
            if not r.decoding:
                self.publish(r, r.computed + new)
        self.join(plan, budget)
        if not preempted:
            self.admit(plan, budget, seen)
        self.start(now, plan)

    def join(self, plan: list[tuple[Request, int]], budget: int) -> None:
        """The request that has migrated to here computes its next token, behind the KV that it brought.

        `seats` has kept a sequence for it since its migration began.
        """
        r = self.joiner
        if r is None or sum(new for _, new in plan) == budget:
            return
        blocks = self.blocks_of(r.tokens)
        if blocks - self.reserved > self.free:
            return
        self.joiner, self.reserved = None, 0
        self.running.append(r)
        r.computed, r.blocks = r.tokens - 1, blocks
        self.evict()
        self.publish(r, r.tokens)
        plan.append((r, 1))

    def seats(self) -> int:
        """Sequences that waiting requests may still take; a request that migrates to here has its own."""
        coming = 1 if self.inbound or self.joiner else 0
        return self.max_seqs - len(self.running) - len(self.leaving) - coming

    def admit(self, plan: list[tuple[Request, int]], budget: int, seen: int) -> None:
        """Admit waiting requests in order, as long as they fit."""
        while self.waiting and self.seats() > 0:
            r = self.waiting[0]
            assert r.arrived is not None
            if r.arrived > seen:
                break
            found = self.cache.match(r.prefix_ids, r.tokens - 1) if self.cache else []
            hits = len(found) * self.cache.block_tokens if self.cache else 0
            past = max(hits, r.hosted)
            new = min(r.tokens - past, budget - sum(new for _, new in plan))
            if new == 0 or not self.has_room(r, found, past, new):
                break
            self.waiting.popleft()
            if r.hosted:
                self.fetch(r, hits)
            elif r.preemptions == 0:
                r.cached = past
            else:
                r.lost -= past
            for key in found:
                assert self.cache
                self.cache.hold(key)
            r.shared, r.computed = found, past
            self.running.append(r)
            r.blocks = self.blocks_of(past + new)
            self.evict()
            self.publish(r, past + new)
            plan.append((r, new))

    def fetch(self, r: Request, hits: int) -> None:
        """Copy back from the host what the prefix cache does not hold."""
        blocks = self.blocks_of(r.hosted)
        if r.hosted > hits:
            self.copying += self.swap_ps(blocks - self.blocks_of(hits))
        self.host_free += blocks
        r.hosted = 0

    def has_room(self, r: Request, found: list[int], past: int, new: int) -> bool:
        """Whether a waiting request's blocks fit beside the watermark."""
        blocks = self.blocks_of(r.tokens if self.reserve else past + new)
        if self.cache:
            held = sum(1 for key in found if self.cache.holders[key] > 0)
            blocks -= held * self.cache.kv_blocks
        return blocks <= self.free - self.watermark

    def start(self, now: int, plan: list[tuple[Request, int]]) -> None:
        """Put the planned iteration in flight; it waits for swaps and is slowed down by a migration."""
        self.batch, self.begin, self.until = plan, now, None
        if plan:
            contexts = [r.tokens for r, _ in plan if r.decoding]
            chunks = [(new, r.computed) for r, new in plan if not r.decoding]
            duration = self.costs.iteration_ps(self.profile, contexts, chunks)
            if self.out or self.inbound:
                duration += duration * self.slowdown // 1_000_000
            self.until = now + duration
        if self.copying:
            self.link_until = max(now, self.link_until) + self.copying
            self.copying = 0
            if self.until is not None:
                self.until += (self.link_until - now) * (1000 - self.overlap) // 1000

    def prefills_beside_decodes(self) -> bool:
        """Whether it decodes while prompts wait or are left over by the iteration in flight."""
        partial = any(r.computed + new < r.tokens for r, new in self.batch)
        return any(r.decoding for r in self.running) and (bool(self.waiting) or partial)

    def complete(self) -> list[Request]:
        """The iteration in flight ends: tokens stream, requests finish, the next iteration starts.

        With asynchronous scheduling that was chosen when this one began: without the requests that finish
        now, but while they hold their memory, and from what had arrived by then.
        """
        assert self.until is not None
        now = self.until
        for r, new in self.batch:
            r.computed += new
            if r.computed == r.tokens:
                self.stream(r, now)
        done = sorted((r for r in self.running if r.streamed == r.output), key=lambda r: r.number)
        for r in done:
            r.finished = now
            self.running.remove(r)
            if self.out and self.out.request is r:
                self.out.abort(now)
        if self.out:
            self.out.boundary(now)
        if self.asynchronous:
            self.leaving = done
            self.schedule(now, self.begin)
            self.leaving = []
        else:
            self.until = None
        for r in done:
            self.drop_kv(r)
        if self.until is None:
            self.schedule(now, now)
        return done

    @staticmethod
    def stream(r: Request, now: int) -> None:
        """Request r streams a token."""
        r.streamed += 1
        r.decoding = True
        if r.first is None:
            r.first = now
        else:
            assert r.last is not None
            r.max_gap = max(r.max_gap, now - r.last)
        r.last = now
