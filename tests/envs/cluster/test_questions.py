"""Every question of played episodes, worked out once more in plain Python from the state of the lane."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from servegym.envs.cluster import schema
from servegym.envs.cluster.episode import Episode
from servegym.envs.cluster.lane import AGENT, advance, close_tick, restart
from servegym.envs.cluster.observe import Frame, make_frame, start_frame
from servegym.envs.cluster.offers import offer_movers, offer_pairs
from servegym.envs.cluster.preemption import default_victim
from servegym.envs.cluster.questions import observe
from servegym.envs.cluster.spec import ClusterSpec, InstanceSpec, Migration
from servegym.envs.cluster.state import (
    BUDGET,
    DISPATCH,
    END,
    MIGRATE,
    MOVE,
    NONE,
    PREEMPT,
    PS,
    World,
    copy_lane,
)
from servegym.envs.cluster.steps import apply
from servegym.envs.cluster.world import build_world
from servegym.envs.costs.model import iteration_ps, prefill_ps
from servegym.envs.workloads.workload import Workload, make_workload
from tests.envs.cluster.plain import PREFIX_TOKENS, Plain

FLEETS = {
    "fcfs": ({}, {"preemption": "swap"}, {"drain_at_s": 4.0}, {"kv_blocks": 200}),
    "priority": ({"queue": "priority"}, {"queue": "priority", "async_scheduling": True}),
}


def make_requests(seed: int, n: int = 160) -> Workload:
    """Bursts of sessions with shared prefixes and three priorities."""
    rng = np.random.default_rng(seed)
    prompt, output = rng.integers(5, 400, n), rng.integers(1, 150, n)
    blocks = (prompt + output) // PREFIX_TOKENS
    ids = [k if k < 6 else 1000 + 100 * row + k for row in range(n) for k in range(int(blocks[row]))]
    after = np.where(rng.random(n) < 0.3, np.arange(n) - 1, -1)
    after[0] = -1
    return make_workload(
        "bursts", np.sort(rng.uniform(0, 6, n)), prompt, output, priority=rng.integers(-1, 2, n), after=after,
        gap_s=np.where(after >= 0, rng.exponential(0.2, n), 0.0), prefix_ids=np.array(ids, np.int32),
        prefix_offsets=np.concatenate([[0], np.cumsum(blocks)]), prefix_block_tokens=PREFIX_TOKENS,
    )  # fmt: skip


def make_world(name: str, seed: int = 0) -> World:
    """Two lanes: one plays, the other takes copies of it."""
    shared = {"kv_blocks": 90, "token_budget": 128, "max_seqs": 24, "swap_gib": 0.05, "swap_group": 4}
    profiles = ("a100-llama-3.1-8b", "l40s-llama-3.1-8b")
    instances = tuple(
        InstanceSpec(profiles[k % 2], **{**shared, **settings}) for k, settings in enumerate(FLEETS[name])
    )
    spec = ClusterSpec(name, instances, migration=Migration(period_s=0.05), budget_period_s=0.04)
    workload = make_requests(seed)
    rng = np.random.default_rng(seed)
    predicted = np.maximum(1, workload.output_tokens * rng.uniform(0.3, 2, len(workload))).astype(np.int32)
    world = build_world([Episode(workload, spec, predicted)], 2)
    world.tables.chunked[:] = (0, 5_000_000_000)  # the other profile launches iterations with chunks eagerly
    return world


def play(world: World, frame: Frame, seed: int = 0):
    """Yield the kind of each question, observed, and answer it at random."""
    rng = np.random.default_rng(seed)
    lane = world.lane[0]
    lane["raises"] = (1 << len(schema.KINDS)) - 1
    restart(world, 0, 0)
    start_frame(world, frame, 0)
    while True:
        kind = MOVE if lane["question"] == MOVE else advance(world, 0, AGENT)
        if kind == END:
            return
        if kind == MIGRATE and not offer_pairs(world, 0):
            close_tick(world, 0)
            continue
        if kind == MOVE:
            offer_movers(world, 0, lane["asker"], lane["target"])
        copy_lane(world, 0, 1)
        observe(world, frame, 0)
        yield kind
        apply(world, frame, 0, rng.choice(np.flatnonzero(frame.mask[0])))


def named(features: tuple[schema.Feature, ...], values: np.ndarray) -> dict[str, float]:
    return dict(zip([f.name for f in features], values.tolist(), strict=True))


def near(found: dict[str, float], rel: float = 1e-6, **expected: float) -> None:
    """The named features have these values, and all others are 0."""
    wanted = dict.fromkeys(found, 0.0) | {name: float(value) for name, value in expected.items()}
    assert found == pytest.approx(wanted, rel=rel, abs=1e-9)


def roughly(found: float, expected: float) -> float:
    """What was found, near what its chunks cost one by one: the kernel takes full ones at their mean past."""
    assert found == pytest.approx(expected, rel=5e-3)
    return found


def check_instances(plain: Plain, frame: Frame) -> None:
    for i in plain.instances:
        inst, setting = plain.inst[i], plain.setting[i]
        node = named(schema.INSTANCE, frame.instances[0, i])
        n, context, to_come = plain.books(i)
        urgent = sum(plain.row["priority"][r] < plain.row["priority"].max() for r in plain.inflight(i))
        hosted = sum(plain.blocks(i, int(plain.req["hosted"][r])) for r in plain.waiting(i))
        near(
            {name: node[name] for name in (
                "inflight", "inflight_context_tokens", "inflight_predicted_tokens", "available",
                "prefill_budget", "urgent_inflight", "host_usage", "engaged", "decode_step_s",
            )},
            inflight=n, inflight_context_tokens=context, inflight_predicted_tokens=to_come,
            available=not plain.drains(i), prefill_budget=inst["cap"], urgent_inflight=urgent,
            host_usage=hosted / setting["host_blocks"], engaged=plain.engaged(i),
            decode_step_s=plain.step_s(i, min(n, setting["max_seqs"]), min(context, plain.capacity(i))),
        )  # fmt: skip


def check_globals(plain: Plain, frame: Frame) -> None:
    arrived = plain.req["arrived"]
    came = arrived[arrived <= plain.now]
    decay = np.exp((came - plain.now) / PS / 10) / 10
    known = named(schema.GLOBAL, frame.globals[0])
    earlier = came[came < plain.now] if frame.kind[0] == DISPATCH else came
    near(
        known, 1e-4,
        instances=len(plain.instances), arrival_rate=decay.sum(),
        arrival_prompt_tokens=(decay * plain.row["prompt"][: len(arrived)][arrived <= plain.now]).sum(),
        since_last_arrival_s=(plain.now - earlier.max(initial=0)) / PS,
        inflight=sum(plain.books(i)[0] for i in plain.instances),
    )  # fmt: skip
    ages = plain.now // PS - came // PS
    wanted = [(ages == age).sum() for age in range(schema.HISTORY - 1, -1, -1)]
    assert frame.history[0].tolist() == wanted


def check_row(plain: Plain, frame: Frame, k: int, r: int) -> None:
    """Row k shows request r where it is."""
    i, row = int(plain.req["instance"][r]), plain.row[r]
    running = {x.r: x for x in plain.running(i)}
    kv = running[r].kv if r in running else int(plain.req["hosted"][r])
    near(
        named(schema.REQUEST, frame.requests[0, k]),
        prompt_tokens=row["prompt"], predicted_output_tokens=row["predicted"], priority=row["priority"],
        slo_ttft_s=row["slo_ttft"], slo_tpot_s=row["slo_tpot"], weight=row["weight"], turn=row["turn"],
        waited_s=(plain.now - plain.req["arrived"][r]) / PS, streamed_tokens=plain.streamed(r),
        predicted_left_tokens=plain.left(r), kv_tokens=kv, running=r in running,
        preemptions=plain.req["preemptions"][r], source_queue_s=plain.queue_s(i),
        source_kv_usage=plain.inst[i]["seen_usage"], source_step_s=plain.step_s(
            i, min(plain.books(i)[0], plain.setting[i]["max_seqs"]), min(plain.books(i)[1], plain.capacity(i))
        ),
    )  # fmt: skip


def check_answer(plain: Plain, frame: Frame, c: int, columns: list[int], r: int, default: bool = False):
    """Candidate c is legal and about request r; returns its edge."""
    assert frame.mask[0, c] == 1
    assert frame.candidates[0, c].tolist() == columns
    assert frame.oracle[0, c] == plain.row["output"][r] - plain.streamed(r)
    edge = named(schema.EDGE, frame.edges[0, c])
    assert edge["is_default"] == default
    return edge


def check_preempt(plain: Plain, frame: Frame) -> None:
    i = int(plain.lane["asker"])
    inst, setting = plain.inst[i], plain.setting[i]
    victims = plain.victims(i)
    running = {x.r: x for x in plain.running(i)}
    legal = [0]
    for k, r in enumerate(victims):
        check_row(plain, frame, k, r)
        x, blocks = running[r], plain.blocks(i, running[r].kv)
        others = [y.kv + 1 for y in plain.decoding(i) if y.r != r]
        held_by = plain.cached(i)
        shared = sum(held_by[key] > 1 for key in plain.prefix(r)[: int(plain.req["units"][r])])
        freed = blocks - shared * PREFIX_TOKENS // int(setting["block_tokens"])
        after = {
            "step_after_s": plain.step_s(i, len(others), sum(others)),
            "kv_after": (setting["blocks"] - inst["free"] - freed) / setting["blocks"],
        }
        edge = check_answer(plain, frame, 1 + 2 * k, [k, i, -1], r)
        near(edge, prefill_s=roughly(edge["prefill_s"], plain.prefill_s(i, x.kv, 0)), **after)
        legal.append(1 + 2 * k)
        can_swap = 0 < blocks <= inst["host_free"]
        if can_swap:
            copies = (
                setting["swap_call"] * -(-blocks // setting["swap_group"]) + setting["swap_block"] * blocks
            )
            edge = check_answer(plain, frame, 2 + 2 * k, [k, i, -1], r)
            near(edge, swap=1, copy_s=2 * copies / PS, **after)
            legal.append(2 + 2 * k)
        if r == default_victim(plain.world, 0, i):
            check_default(frame, 1 + 2 * k + (can_swap and setting["by_swap"]))
    assert np.flatnonzero(frame.mask[0]).tolist() == legal
    assert default_victim(plain.world, 0, i) in victims


def check_default(frame: Frame, c: int) -> None:
    """Candidate 0 does what candidate c does."""
    assert frame.candidates[0, 0].tolist() == frame.candidates[0, c].tolist()
    assert frame.edges[0, 0, 0] == 1 and frame.edges[0, c, 0] == 0
    assert frame.edges[0, 0, 1:].tolist() == frame.edges[0, c, 1:].tolist()
    assert frame.oracle[0, 0] == frame.oracle[0, c]


def check_move_edge(plain: Plain, frame: Frame, c: int, k: int, r: int, s: int, d: int) -> None:
    edge = check_answer(plain, frame, c, [k, d, s], r)
    setting, goal, hit = plain.setting[d], int(plain.row["prompt"][r]) + plain.streamed(r), plain.hit(d, r)
    n, context, to_come = plain.books(d)
    running = {x.r: x for x in plain.decoding(s)}
    copy = prefill = 0.0
    if r in running:
        blocks = plain.blocks(s, running[r].kv)
        copy = (plain.setting[s]["net_call"] + plain.setting[s]["net_block"] * blocks) / PS
    else:
        prefill = roughly(edge["prefill_s"], plain.prefill_s(d, goal - hit, hit))
    previous = int(plain.row["previous_turn"][r])
    near(
        edge,
        prefix_hit_tokens=hit, queue_s=plain.queue_s(d), prefill_s=prefill, copy_s=copy,
        step_after_s=plain.step_s(d, min(n + 1, setting["max_seqs"]), min(context + goal, plain.capacity(d))),
        kv_after=(context + to_come + goal + plain.left(r)) / plain.capacity(d),
        session_last=previous != NONE and plain.req["instance"][previous] == d,
    )  # fmt: skip


def check_migrate(plain: Plain, frame: Frame) -> None:
    sources, destinations = plain.sources(), plain.destinations()
    legal = [0]
    for a, s in enumerate(sources):
        r = int(plain.inst[s]["tail"]) if plain.engaged(s) else plain.default_mover(s)
        check_row(plain, frame, a, r)
        for b, d in enumerate(destinations):
            if plain.movers(s, d):
                legal.append(1 + 4 * a + b)
                check_move_edge(plain, frame, 1 + 4 * a + b, a, r, s, d)
    assert np.flatnonzero(frame.mask[0]).tolist() == legal
    assert len(legal) > 1, "asked only where something may move"
    assert frame.candidates[0, 0].tolist() == [0, sources[0], -1]
    near(named(schema.EDGE, frame.edges[0, 0]), is_default=1)
    assert frame.oracle[0, 0] == 0


def check_move(plain: Plain, frame: Frame) -> None:
    s, d = int(plain.lane["asker"]), int(plain.lane["target"])
    movers = plain.movers(s, d)
    for k, r in enumerate(movers):
        check_row(plain, frame, k, r)
        check_move_edge(plain, frame, 1 + k, k, r, s, d)
    assert frame.mask[0].tolist() == [1] * (1 + len(movers)) + [0] * (frame.mask.shape[1] - 1 - len(movers))
    check_default(frame, 1)


def check_budget(plain: Plain, frame: Frame) -> None:
    i = int(plain.lane["asker"])
    inst, setting = plain.inst[i], plain.setting[i]
    part, waiting = int(inst["part"]), plain.waiting(i)
    check_row(plain, frame, 0, waiting[0] if part == NONE else part)
    past = int(inst["part_done"]) if part != NONE else int(plain.req["hosted"][waiting[0]])
    tokens = int(inst["part_goal"] - inst["part_done"]) if part != NONE else 0
    for r in waiting:
        again = int(plain.row["prompt"][r] + plain.req["done"][r] - plain.req["hosted"][r])
        tokens += again if plain.req["preemptions"][r] else int(plain.req["booked"][r])
    contexts = [x.kv + 1 for x in plain.decoding(i)]
    n, context, p = len(contexts), sum(contexts), setting["profile"]
    for c, cap in enumerate([inst["cap"], 128, 64, 32, 16, 16]):
        chunk = int(min(cap, setting["budget"] - n))
        attention = prefill_ps(plain.world.tables, p, chunk, past)
        iteration = iteration_ps(
            plain.world.tables, p, n, context, context // n, n + chunk, n + 1, attention, chunk
        )  # fmt: skip
        assert frame.candidates[0, c].tolist() == [0, i, -1]
        near(
            named(schema.EDGE, frame.edges[0, c]), is_default=c == 0, prefill_cap=cap,
            iteration_s=iteration / PS, queue_s=iteration / PS * -(-tokens // chunk),
        )  # fmt: skip
    assert frame.mask[0].tolist() == [1] * 6 + [0] * (frame.mask.shape[1] - 6)
    assert (frame.oracle[0] == 0).all()


CHECKS = {PREEMPT: check_preempt, MIGRATE: check_migrate, MOVE: check_move, BUDGET: check_budget}


@pytest.mark.parametrize("name", FLEETS)
def test_every_question_of_an_episode(name):
    world = make_world(name)
    frame = make_frame(2, world.instance.shape[1], schema.OFFERS, oracle=True)
    asked = Counter()
    for kind in play(world, frame):
        asked[kind] += 1
        assert frame.kind[0] == kind
        if kind in CHECKS and asked[kind] % 3:
            continue
        plain = Plain(world)
        check_instances(plain, frame)
        check_globals(plain, frame)
        if kind in CHECKS:
            CHECKS[kind](plain, frame)
    assert min(asked[kind] for kind in (DISPATCH, *CHECKS)) > 20, asked
    assert (world.req[0]["migrations"] > 0).any() and (world.req[0]["preemptions"] > 0).any()


@pytest.mark.parametrize("name", FLEETS)
def test_frames_leave_nothing_behind(name):
    """A frame that has shown many questions shows the next one exactly as a new frame does."""
    world = make_world(name, seed=1)
    instances = world.instance.shape[1]
    frame = make_frame(2, instances, schema.OFFERS, oracle=True)
    fresh = make_frame(2, instances, schema.OFFERS, oracle=True)
    for _ in play(world, frame, seed=1):
        start_frame(world, fresh, 1)
        observe(world, fresh, 1)
        for used, new in zip(frame, fresh, strict=True):
            np.testing.assert_array_equal(used[0], new[1])


def test_features_are_finite_and_positive():
    world = make_world("fcfs", seed=2)
    frame = make_frame(2, world.instance.shape[1], schema.OFFERS)
    priority = schema.column(schema.REQUEST, "priority")
    for _ in play(world, frame, seed=2):
        for array in frame:
            assert np.isfinite(array[0]).all()
        assert (np.delete(frame.requests[0], priority, axis=1) >= 0).all()
        for array in (frame.instances, frame.edges, frame.globals, frame.history):
            assert (array[0] >= 0).all()


def test_an_illegal_default_mover_is_not_offered():
    """A source in a migration offers what waits, though its default mover decodes."""
    world = make_world("fcfs", seed=3)
    frame = make_frame(2, world.instance.shape[1], schema.OFFERS)
    found = 0
    for kind in play(world, frame, seed=3):
        if kind != MOVE:
            continue
        s, d = int(world.lane[0]["asker"]), int(world.lane[0]["target"])
        plain = Plain(world)
        n = offer_movers(world, 0, s, d)
        assert world.offer[0, :n].tolist() == plain.movers(s, d)
        found += plain.default_mover(s) not in world.offer[0, :n]
    assert found
