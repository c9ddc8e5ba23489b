"""The reference simulator: one iteration at a time in plain Python, written to be read.

It is the oracle of the engine, which must produce the same records to the picosecond. Nothing here is fast.
The rules are those of vLLM v1's scheduler; `engine.py` says which details are simplified.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from servegym.envs.cluster.state import PS, World
from servegym.envs.costs.model import CostTables
from servegym.envs.costs.reference import ReferenceCosts
from servegym.envs.records import Records


@dataclass
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
    cached: int = 0
    lost: int = 0

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
    """One engine replica: waiting requests, running requests and KV blocks."""

    def __init__(self, setting: np.void, costs: ReferenceCosts, prefix_tokens: int) -> None:
        self.profile = int(setting["profile"])
        self.capacity = int(setting["blocks"])
        self.block_tokens = int(setting["block_tokens"])
        self.budget, self.max_seqs = int(setting["budget"]), int(setting["max_seqs"])
        self.watermark = int(setting["watermark"])
        self.by_priority, self.reserve = bool(setting["by_priority"]), bool(setting["reserve"])
        self.asynchronous = bool(setting["asynchronous"])
        self.costs = costs
        caching = bool(setting["caching"]) and prefix_tokens > 0
        self.cache = PrefixCache(prefix_tokens, prefix_tokens // self.block_tokens) if caching else None
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission
        self.batch: list[tuple[Request, int]] = []  # requests in flight, with their new tokens
        self.leaving: list[Request] = []  # finished, but too late for the iteration that is chosen now
        self.begin = 0
        self.until: int | None = None

    # --- memory -----------------------------------------------------------------------------------------

    def blocks_of(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // self.block_tokens)

    @property
    def free(self) -> int:
        """Blocks that no running request holds; those of idle prefix blocks count as free."""
        shared = 0
        if self.cache:
            shared = sum(1 for holders in self.cache.holders.values() if holders) * self.cache.kv_blocks
        return self.capacity - shared - sum(self.own_blocks(r) for r in self.running + self.leaving)

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

    def preempt(self) -> None:
        """The worst running request loses its KV and waits again."""
        victim = max(self.running, key=self.order) if self.by_priority else self.running[-1]
        self.running.remove(victim)
        victim.lost += victim.computed
        victim.preemptions += 1
        self.drop_kv(victim)
        self.enqueue(victim, front=True)

    def plan_running(self) -> list[tuple[Request, int]]:
        """New tokens of the running requests: decodes first, then what the budget leaves to the prompt."""
        plan = [(r, 1) for r in self.running if r.decoding]
        budget = self.budget - len(plan)
        return plan + [(r, min(r.tokens - r.computed, budget)) for r in self.running if not r.decoding]

    def schedule(self, now: int, seen: int) -> None:
        """Choose the next iteration from the requests that had arrived by `seen`."""
        preempted = False
        while True:
            plan = self.plan_running()
            need = sum(self.blocks_of(r.computed + new) - r.blocks for r, new in plan)
            if need <= self.free:
                break
            self.preempt()
            preempted = True
        for r, new in plan:
            r.blocks = self.blocks_of(r.computed + new)
        self.evict()
        for r, new in plan:
            if not r.decoding:
                self.publish(r, r.computed + new)
        if not preempted:
            self.admit(plan, seen)
        self.start(now, plan)

    def admit(self, plan: list[tuple[Request, int]], seen: int) -> None:
        """Admit waiting requests in order, as long as they fit."""
        while self.waiting and len(self.running) + len(self.leaving) < self.max_seqs:
            budget = self.budget - sum(new for _, new in plan)
            r = self.waiting[0]
            assert r.arrived is not None
            if r.arrived > seen:
                break
            found = self.cache.match(r.prefix_ids, r.tokens - 1) if self.cache else []
            past = len(found) * self.cache.block_tokens if self.cache else 0
            new = min(r.tokens - past, budget)
            if new == 0 or not self.has_room(r, found, past, new):
                break
            self.waiting.popleft()
            if r.preemptions == 0:
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

    def has_room(self, r: Request, found: list[int], past: int, new: int) -> bool:
        """Whether a waiting request's blocks fit beside the watermark."""
        blocks = self.blocks_of(r.tokens if self.reserve else past + new)
        if self.cache:
            held = sum(1 for key in found if self.cache.holders[key] > 0)
            blocks -= held * self.cache.kv_blocks
        return blocks <= self.free - self.watermark

    def start(self, now: int, plan: list[tuple[Request, int]]) -> None:
        """Put the planned iteration in flight."""
        self.batch, self.begin, self.until = plan, now, None
        if plan:
            contexts = [r.tokens for r, _ in plan if r.decoding]
            chunks = [(new, r.computed) for r, new in plan if not r.decoding]
            self.until = now + self.costs.iteration_ps(self.profile, contexts, chunks)

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


class ReferenceCluster:
    """A cluster that plays one episode of a world; `choose(cluster, request)` names the instance."""

    def __init__(
        self, world: World, episode: int, choose: Callable[[ReferenceCluster, Request], int]
    ) -> None:
        entry = world.episode[episode]
        costs = ReferenceCosts(CostTables(**{name: getattr(world, name) for name in CostTables._fields}))
        settings = world.setting[entry["fleet"]][: world.fleet_size[entry["fleet"]]]
        self.instances = [Instance(s, costs, int(entry["prefix_tokens"])) for s in settings]
        rows = world.row[entry["first_row"] : entry["first_row"] + entry["rows"]]
        self.requests = [_request(world, number, row) for number, row in enumerate(rows)]
        followers = {r.next_turn for r in self.requests}
        self.arrivals = [(int(row["arrived"]), k) for k, row in enumerate(rows) if k not in followers]
        for r in self.requests:
            if r.next_turn >= 0:
                r.gap_to_next = int(rows[r.next_turn]["gap"])
        self.choose = choose
        self.rows = rows

    def run(self) -> Records:
        """Play to the end: at equal times arrivals by row, then iterations by instance."""
        while True:
            busy = [(inst.until, i) for i, inst in enumerate(self.instances) if inst.until is not None]
            arrival = min(self.arrivals, default=None)
            if arrival and (not busy or arrival[0] <= min(busy)[0]):
                self.arrive(*arrival)
            elif busy:
                self.step(min(busy)[1])
            else:
                return self.records()

    def arrive(self, now: int, number: int) -> None:
        """A request reaches the router and goes to an instance."""
        self.arrivals.remove((now, number))
        r = self.requests[number]
        r.arrived = r.dispatched = now
        r.instance = self.choose(self, r)
        inst = self.instances[r.instance]
        inst.enqueue(r)
        if inst.until is None:
            inst.schedule(now, now)

    def step(self, i: int) -> None:
        """An instance's iteration ends; sessions go on after their gap."""
        for r in self.instances[i].complete():
            if r.next_turn >= 0:
                assert r.finished is not None
                self.arrivals.append((r.finished + r.gap_to_next, r.next_turn))

    def records(self) -> Records:
        """Records of all requests."""

        def seconds(name: str) -> np.ndarray:
            times = [getattr(r, name) for r in self.requests]
            return np.array([np.nan if t is None else t / PS for t in times])

        def column(name: str, dtype: type) -> np.ndarray:
            return np.array([getattr(r, name) for r in self.requests], dtype)

        return Records(
            arrived_s=seconds("arrived"),
            dispatched_s=seconds("dispatched"),
            first_token_s=seconds("first"),
            finished_s=seconds("finished"),
            max_gap_s=seconds("max_gap"),
            prompt_tokens=column("prompt", np.int32),
            output_tokens=column("output", np.int32),
            cached_tokens=column("cached", np.int32),
            lost_tokens=column("lost", np.int64),
            preemptions=column("preemptions", np.int32),
            migrations=np.zeros(len(self.requests), np.int32),
            instance=column("instance", np.int32),
            class_id=self.rows["klass"].astype(np.int16),
            priority=column("priority", np.int16),
        )


def _request(world: World, number: int, row: np.void) -> Request:
    ids = world.prefix[row["prefix"] : row["prefix"] + row["prefixes"]].tolist()
    return Request(
        number, int(row["prompt"]), int(row["output"]), int(row["priority"]), ids, int(row["next_turn"])
    )
