"""The state of the cluster model: a few arrays of records, one row a lane, so that a lane is a memory copy.

Times are int64 picoseconds. `World` joins what lanes share (workload rows, fleets, cost tables) with what
they own; the kernels take it whole.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from servegym.envs.costs.tables import CostTables

PS = 1_000_000_000_000  # picoseconds of a second
# Typed by numpy, since a literal would compile kernels once more; kernels mix them with plain integers.
NEVER: Any = np.int64(2**62)
NONE: Any = np.int64(-1)
NOBODY: Any = np.int64(0)  # a count of requests

# Kinds of questions, as in schema.KINDS, and the end of an episode.
DISPATCH, PREEMPT, MIGRATE, MOVE, BUDGET = range(5)
END = -1
# Phases of a migration: copying while the request decodes, about to stop, last copy.
LIVE, STOPPING, LAST = range(3)

# Rows of World.run: what a decoding request needs, in arrays that a scan walks contiguously.
REQUEST, FINISH, OFFSET, GAP, ORDER = range(5)
RUN_ROWS = 5


def _record(**fields: str) -> np.dtype:
    return np.dtype(list(fields.items()), align=True)


# One request of a workload; all workloads of a world stand in one array.
ROW = _record(
    arrived="i8", gap="i8", next_turn="i8", previous_turn="i8",
    prompt="i8", output="i8", predicted="i8", prefix="i8", prefixes="i8",
    priority="i8", turn="i8", klass="i8", slo_ttft="f8", slo_tpot="f8", weight="f8",
)  # fmt: skip
# A workload (its rows, its prefix block) on a fleet: what a lane plays from reset to end. Periods of scrape
# (0: afresh at every decision), migration and budget (0: never); `least_urgent` is the largest priority in
# the workload; slowdown is in parts per million.
EPISODE = _record(
    first_row="i8", rows="i8", fleet="i8", prefix_tokens="i8", longest_output="i8", least_urgent="i8",
    scrape_period="i8", scrape_noise="f8", migrate_period="i8", last_blocks="i8", stages="i8", slowdown="i8",
    budget_period="i8",
)  # fmt: skip
# Settings of an instance in a fleet; `profile` indexes the cost tables.
SETTING = _record(
    profile="i8", blocks="i8", block_tokens="i8", budget="i8", max_seqs="i8", watermark="i8",
    by_priority="i8", reserve="i8", caching="i8", prefill_tokens_per_s="f8",
    decode_tokens_per_s="f8", asynchronous="i8",
    # Swap to the host: blocks there, ps a copy and a block, blocks a copy, part of a copy hidden (1/1000).
    host_blocks="i8", by_swap="i8", swap_call="i8", swap_block="i8", swap_group="i8", overlap="i8",
    # Copies to other instances, ps a copy and a block; from when on the instance drains.
    net_call="i8", net_block="i8", drain="i8",
)  # fmt: skip
LANE = _record(
    now="i8", episode="i8", plays="i8", first_row="i8", rows="i8", fleet="i8", instances="i8",
    next_row="i8", sleeping="i8", unfinished="i8", pending="i8", default="i8", turn="i8", seed="i8",
    room="i8", longest_output="i8", least_urgent="i8",
    decided_at="i8", accrued_at="i8", live_weight="f8", cost="f8", gain="f8", decisions="i8",
    history_second="i8", last_arrival="i8", arrival_rate="f8", prompt_rate="f8", admissions="i8",
    # Questions: which kinds are raised (a bit each), the open one, the instance that asks or whose request
    # moves, and its destination.
    raises="i8", question="i8", asker="i8", target="i8",
    # Migrations in flight; next ticks; the instance that a budget tick asks next; pairs taken at this tick.
    moving="i8", next_migrate="i8", next_budget="i8", budget_turn="i8", pairs="i8",
)  # fmt: skip
# What every decision reads of every instance comes first, in neighbouring cache lines.
INSTANCE = _record(
    # The iteration or decode stretch in flight: begun, ends, its decode steps.
    begin="i8", until="i8", steps="i8",
    # Decoding requests.
    running="i8",
    # What the router knows of its own traffic.
    inflight="i8", prefill_tokens="i8", prompt_tokens="i8", predicted_tokens="i8", streamed_tokens="i8",
    # The scrape: next tick, then the values of the last one.
    next_scrape="i8", scraped_at="i8", seen_running="f8", seen_waiting="f8", seen_usage="f8", seen_rise="f8",
    preemptions="i8", seen_preemptions="i8",
    # Most prompt tokens of an iteration; requests in flight above the least urgent priority; free blocks of
    # host memory; migration away (the request) and to here (the source), or NONE.
    cap="i8", urgent="i8", host_free="i8", out="i8", inbound="i8",
    # Decodes: clock counts iterations; context sums the KV lengths; top is the largest offset to the clock.
    clock="i8", fresh="i8", context="i8", top="i8", next_finish="i8",
    # Blocks not held by requests; those of evictable prefix blocks count as free.
    free="i8",
    # Whether this schedule has preempted; copies that it waits for (ps); decode steps in flight whose blocks
    # are taken; the request that has migrated here and joins the batch next.
    preempted="i8", copying="i8", booked_steps="i8", joiner="i8",
    # Where a question interrupts the scheduler: which of its two calls, what it may see, the finished
    # requests that still hold memory.
    phase="i8", seen="i8", leaving="i8", leaving_count="i8",
    # The one prompt that is partly computed.
    part="i8", part_done="i8", part_goal="i8",
    # Waiting list, linked through REQ.next.
    head="i8", tail="i8", waiting="i8",
    # Prefix cache: blocks of KV a prefix block takes (0: off), idle ones in order of last use.
    unit_blocks="i8", unit_tokens="i8", units="i8", idle_units="i8", oldest="i8", newest="i8", spare="i8",
    # End of the last copy on the link to host and network.
    link_until="i8",
    # Migration away: where to, how far, tokens copied, blocks reserved there, end of the copy; of the request
    # that joins: its KV tokens and blocks; time of the last pair.
    out_to="i8", out_phase="i8", out_stage="i8", out_copied="i8", out_reserved="i8", out_until="i8",
    joiner_kv="i8", joiner_blocks="i8", paired="i8",
    # Freeness at the migration tick (Llumnix).
    freeness="f8",
)  # fmt: skip
REQ = _record(
    next="i4", instance="i4", done="i4", units="i4", preemptions="i4", cached="i4", booked="i4",
    hosted="i4", migrations="i4",
    lost="i8", order="i8",
    arrived="i8", dispatched="i8", first="i8", finished="i8", last="i8", gap="i8",
)  # fmt: skip
# A cached prefix block: its id, how many requests hold it, its neighbours in the order of idle blocks.
UNIT = _record(key="i4", holders="i4", older="i4", newer="i4")
SLEEPER = _record(at="i8", request="i8")


class World(NamedTuple):
    """Everything the kernels read and write.

    Shapes: L lanes, I instances, S running requests, N requests, B tokens of a block, U cached prefix
    blocks, H slots of their hash table, Z sleeping sessions, E episodes, F fleets, R workload rows.
    """

    # owned by lanes
    lane: np.ndarray  # LANE [L]
    instance: np.ndarray  # INSTANCE [L, I]
    run: np.ndarray  # int64 [L, I, RUN_ROWS, S]; decoding requests, then those whose prefill ends now
    residue: np.ndarray  # int32 [L, I, B]; decoding requests by (offset - 1) modulo block size
    req: np.ndarray  # REQ [L, N]
    unit: np.ndarray  # UNIT [L, I, U]
    slot: np.ndarray  # int32 [L, I, H]; hash table of prefix blocks, unit + 1 or 0
    sleeper: np.ndarray  # SLEEPER [L, Z]; heap of closed-loop turns that wait for their time
    history: np.ndarray  # float64 [L, HISTORY]; arrivals a second, ring
    offer: np.ndarray  # int32 [L, OFFERS]; requests that the open question is about, row by row
    receiver: np.ndarray  # int32 [L, DESTINATIONS]; instances that the open migration may go to
    # shared
    row: np.ndarray  # ROW [R]
    prefix: np.ndarray  # int32; prefix ids of all rows
    episode: np.ndarray  # EPISODE [E]
    setting: np.ndarray  # SETTING [F, I]
    fleet_size: np.ndarray  # int64 [F]
    glance: np.ndarray  # float32 [P, S + 1, J, 2]; a decode step at each knot, and per token more, s
    tables: CostTables


OWNED = (
    "lane", "instance", "run", "residue", "req", "unit", "slot", "sleeper", "history", "offer", "receiver",
)  # fmt: skip


def lane_bytes(world: World) -> int:
    """Memory of one lane in bytes."""
    return sum(getattr(world, name)[0].nbytes for name in OWNED)


def copy_lane(world: World, source: int, target: int) -> None:
    """Make lane `target` an exact copy of lane `source`; both then live on independently."""
    for name in OWNED:
        array = getattr(world, name)
        array[target] = array[source]


def snapshot(world: World, lane: int) -> dict[str, np.ndarray]:
    """The lane's state, to be given to `restore` of a world with the same shared part."""
    return {name: getattr(world, name)[lane].copy() for name in OWNED}


def restore(world: World, lane: int, saved: dict[str, np.ndarray]) -> None:
    """Put a snapshot back, in the lane it came from or in another."""
    for name in OWNED:
        getattr(world, name)[lane] = saved[name]
