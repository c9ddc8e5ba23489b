"""The reference simulator: one event at a time in plain Python, written to be read.

It is the oracle of the engine, which must produce the same records to the picosecond. Nothing here is fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import IntEnum

import numpy as np

from servegym.envs.cluster.reference_instance import Instance, Request
from servegym.envs.cluster.reference_migration import Migration
from servegym.envs.cluster.state import NEVER, PS, World
from servegym.envs.costs.reference import ReferenceCosts
from servegym.envs.records import Records


class Event(IntEnum):
    """What can happen next; at equal times in this order, then by row or instance."""

    ARRIVAL, COPY, MIGRATE, BUDGET, ITERATION = range(5)


class ReferenceCluster:
    """A cluster that plays one episode of a world; callbacks answer its questions.

    Args:
        choose: (cluster, request) -> number of the instance that gets a request which arrives.
        victim: (cluster, instance number, running requests) -> the one that gives way to the others and
            whether by swap, or None for the engine's own choice; asked where memory is short, among two or
            more.
        tick: (cluster) -> moves (source, destination, request) at a tick of the migration period, to be made
            in this order; a move that is not legal at its turn is left out.
        budget: (cluster, instance number) -> most prompt tokens of an iteration from now on, or None to leave
            it; asked at ticks of the budget period where an instance decodes and has prompts to compute.
    """

    def __init__(
        self,
        world: World,
        episode: int,
        choose: Callable[[ReferenceCluster, Request], int],
        victim: Callable[[ReferenceCluster, int, list[Request]], tuple[Request, bool] | None] | None = None,
        tick: Callable[[ReferenceCluster], Iterable[tuple[int, int, Request]]] | None = None,
        budget: Callable[[ReferenceCluster, int], int | None] | None = None,
    ) -> None:
        self.entry = entry = world.episode[episode]
        self.choose, self.tick, self.budget = choose, tick, budget
        costs = ReferenceCosts(world.tables)
        settings = world.setting[entry["fleet"]][: world.fleet_size[entry["fleet"]]]

        def choose_victim(i: int, running: list[Request]) -> tuple[Request, bool] | None:
            return victim(self, i, running) if victim else None

        self.instances = [Instance(i, s, entry, costs, choose_victim) for i, s in enumerate(settings)]
        rows = world.row[entry["first_row"] : entry["first_row"] + entry["rows"]]
        self.requests = [_request(world, number, row) for number, row in enumerate(rows)]
        followers = {r.next_turn for r in self.requests}
        self.arrivals = [(int(row["arrived"]), k) for k, row in enumerate(rows) if k not in followers]
        for r in self.requests:
            if r.next_turn >= 0:
                r.gap_to_next = int(rows[r.next_turn]["gap"])
        self.rows = rows
        self.now = 0
        self.migrate_period, self.budget_period = int(entry["migrate_period"]), int(entry["budget_period"])
        self.next_migrate, self.next_budget = self.migrate_period, self.budget_period

    # --- events -----------------------------------------------------------------------------------------

    def run(self) -> Records:
        """Play to the end."""
        happen = {
            Event.ARRIVAL: self.arrive,
            Event.COPY: self.end_copy,
            Event.MIGRATE: self.tick_migrate,
            Event.BUDGET: self.tick_budget,
            Event.ITERATION: self.step,
        }
        while (event := self.next_event()) is not None:
            self.now, kind, which = event
            happen[kind](which)
        return self.records()

    def next_event(self) -> tuple[int, Event, int] | None:
        """Time, kind, and row or instance; ticks go on while anything else is still to come."""
        events = [(at, Event.ARRIVAL, row) for at, row in self.arrivals]
        for i, inst in enumerate(self.instances):
            if inst.until is not None:
                events.append((inst.until, Event.ITERATION, i))
            if inst.out and inst.out.until is not None:
                events.append((inst.out.until, Event.COPY, i))
        if not events:
            return None
        if self.migrate_period:
            events.append((self.next_migrate, Event.MIGRATE, 0))
        if self.budget_period:
            events.append((self.next_budget, Event.BUDGET, 0))
        return min(events)

    def arrive(self, number: int) -> None:
        """A request reaches the router and goes to an instance."""
        self.arrivals.remove((self.now, number))
        r = self.requests[number]
        r.arrived = r.dispatched = self.now
        r.instance = self.choose(self, r)
        inst = self.instances[r.instance]
        inst.enqueue(r)
        if inst.until is None:
            inst.schedule(self.now, self.now)

    def end_copy(self, i: int) -> None:
        """A copy of a migration from instance i ends."""
        migration = self.instances[i].out
        assert migration
        migration.end_copy(self.now)

    def tick_migrate(self, _: int) -> None:
        """Requests may move."""
        self.next_migrate += self.migrate_period
        for source, target, r in self.tick(self) if self.tick else ():
            if self.can_move(source, target, r):
                self.move(source, target, r)

    def tick_budget(self, _: int) -> None:
        """Instances that prefill beside decodes may get another cap."""
        self.next_budget += self.budget_period
        for i, inst in enumerate(self.instances):
            cap = self.budget(self, i) if self.budget and inst.prefills_beside_decodes() else None
            if cap is not None:
                inst.cap = cap

    def step(self, i: int) -> None:
        """An instance's iteration ends; sessions go on after their gap."""
        for r in self.instances[i].complete():
            if r.next_turn >= 0:
                assert r.finished is not None
                self.arrivals.append((r.finished + r.gap_to_next, r.next_turn))

    # --- migration --------------------------------------------------------------------------------------

    def fits(self, i: int, r: Request) -> bool:
        """Whether instance i may get r: it does not drain, and holds its prompt and the longest output.

        That is the workload's, but no more than fits the largest of the instances that never drain.
        """
        lasting = [inst.room for inst in self.instances if inst.drain == NEVER]
        tokens = min(r.prompt + int(self.entry["longest_output"]), max(lasting, default=0))
        inst = self.instances[i]
        return tokens <= inst.room and self.now < inst.drain

    def can_move(self, s: int, d: int, r: Request) -> bool:
        """Whether request r may go from instance s to instance d now."""
        source, target = self.instances[s], self.instances[d]
        if s == d or not self.fits(d, r):
            return False
        if r in source.waiting:
            return r.hosted == 0
        if r not in source.running or not r.decoding:
            return False
        if source.out or source.inbound or target.out or target.inbound or target.joiner:
            return False
        if len(target.running) == target.max_seqs:
            return False
        full = r.computed // source.block_tokens * source.block_tokens
        return target.blocks_of(full) <= target.free - target.watermark

    def move(self, s: int, d: int, r: Request) -> None:
        """Request r leaves for instance d: at once while it waits, by live migration while it decodes."""
        source, target = self.instances[s], self.instances[d]
        if r in source.running:
            last_blocks, stages = int(self.entry["last_blocks"]), int(self.entry["stages"])
            Migration(r, source, target, last_blocks, stages).begin(self.now)
            return
        source.waiting.remove(r)
        target.enqueue(r)
        r.instance = d
        r.migrations += 1
        source.kick(self.now)
        target.kick(self.now)

    # --- results ----------------------------------------------------------------------------------------

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
            migrations=column("migrations", np.int32),
            instance=column("instance", np.int32),
            class_id=self.rows["klass"].astype(np.int16),
            priority=column("priority", np.int16),
        )


def _request(world: World, number: int, row: np.void) -> Request:
    ids = world.prefix[row["prefix"] : row["prefix"] + row["prefixes"]].tolist()
    return Request(
        number, int(row["prompt"]), int(row["output"]), int(row["priority"]), ids, int(row["next_turn"])
    )
