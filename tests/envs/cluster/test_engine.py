"""The engine against the reference simulator: identical records over random everything."""

from __future__ import annotations

import os
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from servegym.envs.cluster.episode import Episode
from servegym.envs.cluster.lane import AGENT, END, ROUND_ROBIN, advance, dispatch, restart, run_lanes
from servegym.envs.cluster.reference import ReferenceCluster
from servegym.envs.cluster.simulate import records_of, simulate
from servegym.envs.cluster.spec import ClusterSpec, InstanceSpec, parse_cluster
from servegym.envs.cluster.state import NONE, copy_lane, lane_bytes, restore, snapshot
from servegym.envs.cluster.world import build_world
from servegym.envs.costs.reference import ReferenceCosts
from servegym.envs.workloads import generate
from servegym.envs.workloads.workload import Workload, make_workload

# SERVEGYM_EXAMPLES raises the number of random cases for a long hunt.
EXAMPLES = int(os.environ.get("SERVEGYM_EXAMPLES", "300"))
PROFILES = ("a100-llama-3.1-8b", "h100-llama-3.1-8b", "l40s-llama-3.1-8b")
PREFIX_TOKENS = 32
EAGER_PS = 7_000_000_000  # of launches that an iteration with chunks does not replay


@st.composite
def workloads(draw) -> Workload:
    """Up to 40 requests: bursts and lulls, closed-loop sessions, shared prefixes, priorities."""
    n = draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    pace = draw(st.sampled_from([0.0, 0.002, 0.02, 0.2]))
    arrived = np.cumsum(rng.exponential(1.0, n) * pace * (rng.random(n) < 0.8))
    prompt = rng.integers(1, draw(st.sampled_from([3, 40, 200, 700])), n, endpoint=True)
    output = rng.integers(1, draw(st.sampled_from([1, 5, 60, 300])), n, endpoint=True)
    after = np.full(n, -1)
    if draw(st.booleans()):
        last: dict[int, int] = {}
        for row, session in enumerate(rng.integers(0, max(n // 3, 1), n)):
            after[row] = last.get(int(session), -1)
            last[int(session)] = row
    ids, offsets = [], [0]
    with_prefixes = draw(st.booleans())
    for row in range(n):
        if with_prefixes:
            tree = int(rng.integers(0, 3))
            blocks = int(rng.integers(0, (prompt[row] + output[row]) // PREFIX_TOKENS, endpoint=True))
            shared = int(rng.integers(0, blocks, endpoint=True))
            ids += [tree * 100 + k for k in range(shared)]
            ids += [1000 + row * 40 + k for k in range(blocks - shared)]
        offsets.append(len(ids))
    return make_workload(
        "random", arrived, prompt, output, priority=rng.integers(0, 3, n), after=after,
        gap_s=np.where(after >= 0, rng.choice([0.0, 0.01, 0.3], n), 0.0),
        prefix_ids=np.array(ids, np.int32), prefix_offsets=np.array(offsets),
        prefix_block_tokens=PREFIX_TOKENS if ids else 0,
    )  # fmt: skip


@st.composite
def clusters(draw, largest: int) -> ClusterSpec:
    """One to three instances with scarce to plentiful KV; each can hold the largest request."""
    instances = []
    for _ in range(draw(st.integers(1, 3))):
        size = draw(st.sampled_from([1, 4, 16, 32]))
        needed = -(-largest // size)
        blocks = needed + draw(st.sampled_from([0, 1, needed // 4, 2 * needed, 20 * needed]))
        budget = draw(st.sampled_from([16, 64, 333, 2048]))
        watermark = draw(st.sampled_from([0.0, 0.0, 0.01]))
        if blocks - int(watermark * blocks) < needed:
            watermark = 0.0
        instances.append(
            InstanceSpec(
                draw(st.sampled_from(PROFILES)), blocks, size, budget, draw(st.integers(1, min(budget, 64))),
                watermark, draw(st.sampled_from(["fcfs", "priority"])), draw(st.booleans()),
                draw(st.booleans()),
            )
        )  # fmt: skip
    return ClusterSpec("random", tuple(instances), draw(st.booleans()))


@st.composite
def cases(draw) -> tuple[Episode, np.ndarray]:
    workload = draw(workloads())
    cluster = draw(clusters(int((workload.prompt_tokens + workload.output_tokens).max())))
    choices = np.random.default_rng(draw(st.integers(0, 2**32))).integers(0, len(cluster), len(workload))
    return Episode(workload, cluster, workload.output_tokens), choices


def check_conservation(world, lane: int) -> None:
    """Blocks used and free make the capacity, and every request is in exactly one place."""
    state = world.lane[lane]
    places = np.zeros(state["rows"], int)
    for i in range(state["instances"]):
        inst, setting = world.instance[lane, i], world.setting[state["fleet"], i]
        size, shared, own = setting["block_tokens"], set(), 0
        members = [int(r) for r in world.run[lane, i, 0, : inst["running"] + inst["fresh"]]]
        if inst["part"] != NONE:
            members.append(int(inst["part"]))
            own += -(-int(inst["part_done"]) // size)
        for k in range(inst["running"]):
            kv = int(world.run[lane, i, 2, k] + inst["clock"])  # with the block of the step in flight
            own += -(-kv // size)
        for k in range(inst["running"], inst["running"] + inst["fresh"]):
            own += -(-int(world.run[lane, i, 2, k] + inst["clock"]) // size)
        for r in members:
            row = world.row[state["first_row"] + r]
            held = int(world.req[lane, r]["units"])
            own -= held * int(inst["unit_blocks"])
            shared |= set(world.prefix[row["prefix"] : row["prefix"] + held].tolist())
        assert own + len(shared) * inst["unit_blocks"] + inst["free"] == setting["blocks"]
        assert 0 <= inst["idle_units"] * inst["unit_blocks"] <= inst["free"]
        assert inst["units"] == inst["idle_units"] + len(shared) or not inst["unit_blocks"]
        places[members] += 1
        at, waiting = inst["head"], 0
        while at != NONE:
            places[at] += 1
            waiting += 1
            at = world.req[lane, at]["next"]
        assert waiting == inst["waiting"]
        assert inst["inflight"] == waiting + len(members)
        assert inst["running"] + inst["fresh"] + (inst["part"] != NONE) <= setting["max_seqs"]
    req = world.req[lane, : state["rows"]]
    arrived = req["instance"] != NONE
    finished = req["finished"] < 2**62
    assert (places == (arrived & ~finished)).all()


def play(world, lane: int, choices: np.ndarray, *, check: bool = True) -> None:
    while advance(world, lane, AGENT) != END:
        if check:
            check_conservation(world, lane)
        dispatch(world, lane, int(choices[world.lane[lane]["pending"]]))


def assert_equal(ours, reference) -> None:
    for field in fields(ours):
        np.testing.assert_array_equal(
            getattr(ours, field.name), getattr(reference, field.name), err_msg=field.name
        )


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases(), st.sampled_from([0, EAGER_PS]))
def test_engine_equals_reference(case, chunked):
    episode, choices = case
    world = build_world([episode], 1)
    world.tables.chunked[:] = chunked
    restart(world, 0, 0)
    play(world, 0, choices)
    reference = ReferenceCluster(world, 0, lambda _, r: int(choices[r.number])).run()
    assert_equal(records_of(world, 0), reference)


@settings(max_examples=max(EXAMPLES // 3, 1), deadline=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_tokens_are_computed_once_or_lost(case):
    """Every instance's decode clock and every request's records add up to the tokens that were asked for."""
    episode, choices = case
    world = build_world([episode], 1)
    restart(world, 0, 0)
    play(world, 0, choices, check=False)
    records = records_of(world, 0)
    assert np.isfinite(records.finished_s).all()
    assert (records.lost_tokens >= 0).all()
    assert ((records.preemptions > 0) | (records.lost_tokens == 0)).all()
    assert (records.arrived_s <= records.dispatched_s).all()
    assert (records.first_token_s <= records.finished_s).all()
    assert (records.cached_tokens < records.prompt_tokens).all()
    for i in range(len(episode.cluster)):
        inst = world.instance[0, i]
        assert inst["free"] == world.setting[0, i]["blocks"]
        for name in ("inflight", "prompt_tokens", "streamed_tokens", "prefill_tokens"):
            assert inst[name] == 0


@settings(max_examples=max(EXAMPLES // 5, 1), deadline=None, suppress_health_check=list(HealthCheck))
@given(cases(), st.integers(0, 40))
def test_branches_live_independently(case, cut):
    """A lane copied at any decision, or restored from a snapshot, ends like the original."""
    episode, choices = case
    world = build_world([episode], 3)
    restart(world, 0, 0)
    for _ in range(cut):
        if advance(world, 0, AGENT) == END:
            break
        dispatch(world, 0, int(choices[world.lane[0]["pending"]]))
    saved = snapshot(world, 0)
    copy_lane(world, 0, 1)
    play(world, 1, (choices + 1) % len(episode.cluster))  # another answer on the same future
    play(world, 0, choices)
    restore(world, 2, saved)
    play(world, 2, choices)
    assert_equal(records_of(world, 2), records_of(world, 0))


def test_one_request_costs_what_its_iterations_cost():
    """Golden walk: 1,000 prompt tokens at a budget of 512 are two chunks, then four decode steps."""
    workload = make_workload("golden", [1.0], [1000], [5])
    cluster = parse_cluster("1xa100-llama-3.1-8b", token_budget=512, max_seqs=8)
    records = simulate(cluster, workload)
    world = build_world([Episode(workload, cluster, workload.output_tokens)], 1)
    costs = ReferenceCosts(world.tables)
    prefill = costs.iteration_ps(0, [], [(512, 0)]) + costs.iteration_ps(0, [], [(488, 512)])
    decode = [costs.iteration_ps(0, [context], []) for context in (1001, 1002, 1003, 1004)]
    assert records.first_token_s[0] == pytest.approx(1.0 + prefill / 1e12, abs=1e-12)
    assert records.finished_s[0] == pytest.approx(1.0 + (prefill + sum(decode)) / 1e12, abs=1e-12)
    assert records.max_gap_s[0] == decode[-1] / 1e12


def test_scarce_memory_preempts_the_last_admitted():
    """Two requests grow until one block is missing: the younger loses its KV and starts again."""
    workload = make_workload("scarce", [0.0, 0.0], [16, 16], [40, 40])
    cluster = parse_cluster("1xa100-llama-3.1-8b", kv_blocks=5)
    records = simulate(cluster, workload)
    assert records.preemptions.tolist() == [0, 1]
    # Both hold 3 blocks at 33 tokens; the sixth is missing, when 16 prompt + 16 output tokens are computed.
    assert records.lost_tokens.tolist() == [0, 32]
    assert records.finished_s[0] < records.finished_s[1]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_asynchronous_scheduling_admits_one_iteration_later(asynchronous):
    """A seat given back, and an arrival in the middle of an iteration, count one iteration later."""
    workload = make_workload("seat", [0.0] * 3, [16] * 3, [3, 40, 2])
    cluster = parse_cluster("1xa100-llama-3.1-8b", max_seqs=2, async_scheduling=asynchronous)
    world = build_world([Episode(workload, cluster, workload.output_tokens)], 1)
    costs = ReferenceCosts(world.tables)
    prompt = [(16, 0)]
    shapes = [([], prompt), ([17], prompt), ([18, 17], [])]  # the first request has finished
    shapes += [([18], []), ([19], prompt)] if asynchronous else [([18], prompt)]
    times = [costs.iteration_ps(0, *shape) for shape in shapes]
    records = simulate(cluster, workload)
    assert records.first_token_s[2] == pytest.approx(sum(times) / 1e12, abs=1e-12)
    alone = replace(cluster.instances[0], max_seqs=None)
    late = make_workload("late", [0.0, 1e-4], [16, 16], [9, 1])
    first, second = (simulate(replace(cluster, instances=(alone,)), late).first_token_s).tolist()
    step = costs.iteration_ps(0, [17], []) if asynchronous else 0
    joint = costs.iteration_ps(0, [18 if asynchronous else 17], [(16, 0)])
    assert second == pytest.approx(first + (step + joint) / 1e12, abs=1e-12)


def test_priorities_preempt_the_least_urgent():
    workload = make_workload("urgent", [0.0, 0.0], [16, 16], [40, 40], priority=np.array([1, 0]))
    cluster = parse_cluster("1xa100-llama-3.1-8b", kv_blocks=5, queue="priority")
    assert simulate(cluster, workload).preemptions.tolist() == [1, 0]


def test_prefix_hits_save_whole_blocks_but_never_the_last_token():
    ids = np.array([0, 1, 0, 1], np.int32)
    workload = make_workload(
        "hits", [0.0, 5.0], [64, 64], [1, 1], prefix_ids=ids, prefix_offsets=np.array([0, 2, 4]),
        prefix_block_tokens=32,
    )  # fmt: skip
    cluster = parse_cluster("1xa100-llama-3.1-8b")
    records = simulate(cluster, workload)
    assert records.cached_tokens.tolist() == [0, 32]
    without = simulate(replace(cluster, prefix_caching=False), workload)
    assert without.cached_tokens.tolist() == [0, 0]


def test_results_do_not_depend_on_the_lane():
    workload = generate("azure2023_conv", 300, seed=3)
    cluster = parse_cluster("3xa100-llama-3.1-8b", kv_blocks=400)
    world = build_world([Episode(workload, cluster, workload.output_tokens)], 4)
    run_lanes(world, ROUND_ROBIN)
    results = [records_of(world, lane) for lane in range(4)]
    for other in results[1:]:
        assert_equal(results[0], other)
    assert results[0].preemptions.sum() > 0


def test_a_lane_of_16_instances_and_4096_requests_is_small():
    workload = generate("azure2023_conv", 4096, seed=0)
    cluster = parse_cluster("16xa100-llama-3.1-8b")
    world = build_world([Episode(workload, cluster, workload.output_tokens)], 1)
    assert lane_bytes(world) < 4_000_000


def test_at_equal_times_arrivals_come_before_iterations():
    """Twin instances end an iteration at once; the turn that follows on the first joins the other's next."""
    workload = make_workload(
        "twins", [0.0] * 5, [16] * 5, [5, 50, 5, 50, 3], after=np.array([-1, -1, -1, -1, 0])
    )
    cluster = parse_cluster("2xa100-llama-3.1-8b")
    world = build_world([Episode(workload, cluster, workload.output_tokens)], 1)
    choices = np.array([0, 0, 1, 1, 1])
    restart(world, 0, 0)
    play(world, 0, choices)
    reference = ReferenceCluster(world, 0, lambda _, r: int(choices[r.number])).run()
    records = records_of(world, 0)
    assert_equal(records, reference)
    assert records.finished_s[0] == records.finished_s[2] == records.arrived_s[4]
    step = records.max_gap_s[4]
    assert records.ttft_s[4] < 2 * step, "it waited for an iteration that started without it"
