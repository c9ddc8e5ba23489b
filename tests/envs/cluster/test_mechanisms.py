"""Swap, migration, caps and drains: the engine against the reference under identical random answers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from random import Random

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from servegym.envs.cluster import engine, migration
from servegym.envs.cluster.episode import Episode
from servegym.envs.cluster.lane import AGENT, advance, close_tick, dispatch, restart
from servegym.envs.cluster.memory import fits
from servegym.envs.cluster.preemption import default_victim
from servegym.envs.cluster.reference import ReferenceCluster
from servegym.envs.cluster.schema import KINDS
from servegym.envs.cluster.settings import GIB
from servegym.envs.cluster.simulate import records_of
from servegym.envs.cluster.spec import ClusterSpec, InstanceSpec, Migration
from servegym.envs.cluster.state import END, LAST, NEVER, NONE, OFFSET, REQUEST, World
from servegym.envs.cluster.world import build_world
from servegym.envs.costs import load_profile
from servegym.envs.workloads.workload import Workload, make_workload

EXAMPLES = int(os.environ.get("SERVEGYM_EXAMPLES", "300"))
PROFILES = ("a100-llama-3.1-8b", "l40s-llama-3.1-8b")
PREFIX_TOKENS = 16
MS = 1_000_000_000


@dataclass(frozen=True)
class Answers:
    """Pseudo-random answers that depend on nothing but the question, so that both simulators get the same."""

    seed: int
    raised: tuple[str, ...]  # kinds that are asked

    def draw(self, *question: object) -> Random:
        return Random(repr((self.seed, *question)))

    def instance(self, number: int, allowed: Sequence[int]) -> int:
        return self.draw("dispatch", number).choice(allowed)

    def victim(self, now: int, i: int, numbers: Sequence[int]) -> tuple[int, bool] | None:
        rng = self.draw("preempt", now, i, sorted(numbers))
        return None if rng.random() < 0.2 else (rng.choice(sorted(numbers)), rng.random() < 0.6)

    def moves(
        self, now: int, places: Sequence[tuple[int, int]], instances: int
    ) -> list[tuple[int, int, int]]:
        """(source, destination, request) in the order of the attempts, from (request, instance) pairs."""
        rng = self.draw("migrate", now)
        tries = rng.sample(sorted(places), min(len(places), 6))
        return [(i, rng.randrange(instances), r) for r, i in tries]

    def cap(self, now: int, i: int) -> int | None:
        return self.draw("budget", now, i).choice([None, 1, 3, 16, 100, 2048])


@st.composite
def workloads(draw) -> Workload:
    """Up to 30 requests that mostly decode, in bursts, with sessions, shared prefixes and priorities."""
    n = draw(st.integers(2, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    arrived = np.cumsum(rng.exponential(draw(st.sampled_from([0.001, 0.02, 0.2])), n) * (rng.random(n) < 0.7))
    prompt = rng.integers(1, draw(st.sampled_from([3, 40, 200, 700])), n, endpoint=True)
    output = rng.integers(1, draw(st.sampled_from([20, 100, 300])), n, endpoint=True)
    after = np.full(n, -1)
    if draw(st.booleans()):
        after[1:] = np.where(rng.random(n - 1) < 0.3, np.arange(n - 1), -1)
    cached = draw(st.sampled_from([True, True, False]))
    blocks = (prompt + output) // PREFIX_TOKENS if cached else np.zeros(n, int)
    shared = rng.integers(blocks // 2, blocks, endpoint=True)  # the other ids belong to the request alone
    ids = [
        k if k < shared[row] else 1000 + 100 * row + k for row in range(n) for k in range(int(blocks[row]))
    ]
    return make_workload(
        "random", arrived, prompt, output, priority=rng.integers(0, 3, n), after=after,
        gap_s=np.where(after >= 0, rng.choice([0.0, 0.01, 0.3], n), 0.0),
        prefix_ids=np.array(ids, np.int32), prefix_offsets=np.concatenate([[0], np.cumsum(blocks)]),
        prefix_block_tokens=PREFIX_TOKENS if ids else 0,
    )  # fmt: skip


@st.composite
def instances(draw, largest: int) -> InstanceSpec:
    """An instance with scarce KV that holds the largest request, and little or no host memory."""
    profile = draw(st.sampled_from(PROFILES))
    size = draw(st.sampled_from([1, 4, 16]))
    needed = -(-largest // size)
    blocks = needed + draw(st.sampled_from([0, needed // 4, needed // 2, needed, 2 * needed, 5 * needed]))
    watermark = draw(st.sampled_from([0.0, 0.05, 0.2]))
    if blocks - int(watermark * blocks) < needed:
        watermark = 0.0
    host_blocks = draw(st.sampled_from([0, 1, needed // 2, 3 * needed]))
    budget = draw(st.sampled_from([16, 64, 333, 2048]))
    return InstanceSpec(
        profile, blocks, size, budget, min(budget, draw(st.sampled_from([1, 2, 3, 8, 40]))), watermark,
        queue=draw(st.sampled_from(["fcfs", "priority"])),
        reserve_prompt=draw(st.booleans()),
        async_scheduling=draw(st.booleans()),
        preemption=draw(st.sampled_from(["recompute", "swap"])) if host_blocks else "recompute",
        swap_gib=host_blocks * size * load_profile(profile).model.kv_bytes_per_token / GIB,
        swap_group=draw(st.sampled_from([1, 3, 60])),
    )  # fmt: skip


@st.composite
def cases(draw) -> tuple[World, Answers]:
    workload = draw(workloads())
    largest = int((workload.prompt_tokens + workload.output_tokens).max())
    fleet = [draw(instances(largest)) for _ in range(draw(st.sampled_from([2, 3, 2, 1])))]
    moving = None
    if draw(st.sampled_from([True, True, True, False])):
        moving = Migration(
            draw(st.sampled_from([0.01, 0.05, 0.3])), draw(st.integers(0, 3)), draw(st.integers(1, 3)),
            draw(st.sampled_from([0.0, 0.023, 0.5])),
        )  # fmt: skip
    cluster = ClusterSpec(
        "random", tuple(fleet), draw(st.sampled_from([True, True, False])), moving,
        draw(st.sampled_from([0.0, 0.02, 0.1])),
    )  # fmt: skip
    world = build_world([Episode(workload, cluster, workload.output_tokens)], 1)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    for setting in world.setting[0]:
        # Copies of any length against iterations of about 20 ms; drains at any time, but never of all.
        typical_ms = {"swap_call": 0.3, "swap_block": 0.1, "net_call": 20.0, "net_block": 2.0}
        for name, typical in typical_ms.items():
            setting[name] = round(rng.choice([0.0, typical, 10 * typical]) * MS)
        setting["overlap"] = rng.choice([0, 333, 1000])
    world.tables.chunked[:] = rng.choice([0, 7 * MS])
    for setting in world.setting[0, 1:]:
        setting["drain"] = rng.choice([NEVER, NEVER, round(rng.random() * 500) * MS])
    raised = tuple(k for k in ("preempt", "migrate", "budget") if draw(st.sampled_from([True, True, False])))
    return world, Answers(draw(st.integers(0, 2**32)), raised)


def reference_of(world: World, answers: Answers) -> ReferenceCluster:
    """The reference under these answers."""

    def choose(cluster, r):
        return answers.instance(r.number, [i for i in range(len(cluster.instances)) if cluster.fits(i, r)])

    def victim(cluster, i, running):
        answer = answers.victim(cluster.now, i, [r.number for r in running])
        return answer and (cluster.requests[answer[0]], answer[1])

    def tick(cluster):
        here = [(r.number, r.instance) for r in cluster.requests if r.instance >= 0 and r.finished is None]
        for s, d, number in answers.moves(cluster.now, here, len(cluster.instances)):
            yield s, d, cluster.requests[number]

    def budget(cluster, i):
        return answers.cap(cluster.now, i)

    asked = {"preempt": victim, "migrate": tick, "budget": budget}
    return CheckedReference(world, 0, choose, *(asked[k] if k in answers.raised else None for k in asked))


class CheckedReference(ReferenceCluster):
    """Counts blocks and requests before every event."""

    def next_event(self):
        places = []
        for inst in self.instances:
            waiting = list(inst.waiting)
            places += waiting + inst.running + inst.stopped + ([inst.joiner] if inst.joiner else [])
            idle = len(inst.cache.idle) * inst.cache.kv_blocks if inst.cache else 0
            assert 0 <= idle <= inst.free <= inst.capacity
            assert inst.reserved == 0 or inst.inbound or inst.joiner
            assert inst.host_free + sum(inst.blocks_of(r.hosted) for r in waiting) == inst.host_blocks
        assert all(r in self.instances[r.instance].waiting for r in self.requests if r.hosted)
        live = [r.number for r in self.requests if r.instance >= 0 and r.finished is None]
        assert sorted(r.number for r in places) == live
        return super().next_event()


def play(world: World, answers: Answers) -> None:
    """The engine under these answers."""
    restart(world, 0, 0)
    lane = world.lane[0]
    lane["raises"] = sum(1 << KINDS.index(kind) for kind in answers.raised)
    numbers = range(int(lane["instances"]))
    while (kind := advance(world, 0, AGENT)) != END:
        check_conservation(world)
        now, i = int(lane["now"]), int(lane["asker"])
        match KINDS[kind]:
            case "dispatch":
                r = int(lane["pending"])
                dispatch(world, 0, answers.instance(r, [i for i in numbers if fits(world, 0, i, r)]))
            case "preempt":
                inst = world.instance[0, i]
                running = world.run[0, i, REQUEST, : inst["running"]].tolist()
                victims = running + ([int(inst["part"])] if inst["part"] != NONE else [])
                default = int(default_victim(world, 0, i)), bool(world.setting[0, i]["by_swap"])
                r, by_swap = answers.victim(now, i, victims) or default
                engine.preempt(world, 0, i, r, by_swap, now)
            case "migrate":
                req = world.req[0]
                here = np.flatnonzero((req["instance"] != NONE) & (req["finished"] == NEVER)).tolist()
                places = [(r, int(req[r]["instance"])) for r in here]
                for k in numbers:
                    migration.bring_up(world, 0, k)
                for s, d, r in answers.moves(now, places, len(numbers)):
                    if migration.can_move(world, 0, s, d, r):
                        migration.move(world, 0, s, d, r)
                        check_conservation(world)
                close_tick(world, 0)
            case "budget":
                cap = answers.cap(now, i)
                if cap is not None:
                    engine.set_cap(world, 0, i, cap)


def check_conservation(world: World) -> None:
    """Blocks used, free and reserved make the capacity, on the host too; a request is in one place."""
    state, req = world.lane[0], world.req[0]
    places = np.zeros(len(req), int)
    for i in range(state["instances"]):
        inst, setting = world.instance[0, i], world.setting[state["fleet"], i]
        waiting = chain(req, inst["head"])
        kv = {int(inst["part"]): int(inst["part_done"])} if inst["part"] != NONE else {}
        for k in range(inst["running"] + inst["fresh"]):
            steps = inst["booked_steps"] if k < inst["running"] else 1  # blocks of booked steps are taken
            kv[int(world.run[0, i, REQUEST, k])] = int(world.run[0, i, OFFSET, k] + inst["clock"] - 1 + steps)
        batch = len(kv)
        if inst["out"] != NONE and inst["out_phase"] == LAST:
            kv[int(inst["out"])] = int(inst["out_copied"])
        for r in chain(req, inst["leaving"]):
            row = world.row[state["first_row"] + r]
            kv[r] = int(row["prompt"] + row["output"] - 1)
        blocks, coming = held_blocks(world, i, kv), inst["inbound"] != NONE or inst["joiner"] != NONE
        if inst["inbound"] != NONE:
            blocks += world.instance[0, inst["inbound"]]["out_reserved"]
        if inst["joiner"] != NONE:
            blocks += inst["joiner_blocks"]
            places[inst["joiner"]] += 1
        assert blocks + inst["free"] == setting["blocks"]
        assert 0 <= inst["idle_units"] * inst["unit_blocks"] <= inst["free"]
        hosted = sum(-(-int(req[r]["hosted"]) // setting["block_tokens"]) for r in waiting)
        assert inst["host_free"] + hosted == setting["host_blocks"]
        assert batch + coming <= setting["max_seqs"]
        members = [r for r in kv if req[r]["finished"] == NEVER] + waiting
        places[members] += 1
        assert len(waiting) == inst["waiting"]
        assert inst["inflight"] == len(members) + (inst["joiner"] != NONE)
        assert (req["instance"][members] == i).all()
    assert (places == ((req["instance"] != NONE) & (req["finished"] == NEVER))).all()


def chain(req: np.ndarray, first: int) -> list[int]:
    """Requests linked through `next`."""
    found = []
    while first != NONE:
        found.append(int(first))
        first = req[first]["next"]
    return found


def held_blocks(world: World, i: int, kv: dict[int, int]) -> int:
    """Blocks of requests with so many tokens of KV; prefix blocks that they share count once."""
    inst, first_row = world.instance[0, i], world.lane[0]["first_row"]
    size, shared, own = int(world.setting[0, i]["block_tokens"]), set(), 0
    for r, tokens in kv.items():
        row, units = world.row[first_row + r], int(world.req[0, r]["units"])
        own += -(-tokens // size) - units * int(inst["unit_blocks"])
        shared |= set(world.prefix[row["prefix"] : row["prefix"] + units].tolist())
    assert inst["units"] == inst["idle_units"] + len(shared) or not inst["unit_blocks"]
    return own + len(shared) * int(inst["unit_blocks"])


@settings(max_examples=max(EXAMPLES // 2, 1), deadline=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_engine_equals_reference_under_all_levers(case):
    world, answers = case
    reference = reference_of(world, answers)
    theirs = reference.run()
    assert np.isfinite(theirs.finished_s).all()
    for inst in reference.instances:
        assert inst.free == inst.capacity and inst.host_free == inst.host_blocks
        assert not (inst.out or inst.inbound or inst.joiner or inst.reserved)
    play(world, answers)
    check_conservation(world)
    ours = records_of(world, 0)
    for field in fields(ours):
        np.testing.assert_array_equal(
            getattr(ours, field.name), getattr(theirs, field.name), err_msg=field.name
        )
