"""Timelines: valid traces, the records' times, and what the scheduler did between them."""

import json
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servegym.envs.cluster.env import ClusterEnv, DispatchEnv
from servegym.envs.cluster.episode import Episode, make_episodes
from servegym.envs.cluster.moment import DECODE, OUTSIDE, PREFILL, QUEUED, STOPPED, Moment, Move
from servegym.envs.cluster.spec import ClusterSpec, Migration
from servegym.envs.cluster.timeline import COPIES, FIRST, Timeline, record_timeline
from servegym.envs.records import Records
from servegym.envs.scenario import Scenario
from servegym.envs.workloads.workload import make_workload

GOLDEN = Path(__file__).with_name("timeline.json")
FRESH = Scenario(scrape_s=0.0)


def spans(trace, request):
    """(process, phase, start, end) of a request in microseconds, in order of time."""
    found = [e for e in trace["traceEvents"] if e["ph"] == "X" and e["name"] == f"request {request}"]
    return [(e["pid"], e["cat"], e["ts"], e["ts"] + e["dur"]) for e in found]


def ns(microseconds):
    return round(microseconds * 1000)


def flows(trace):
    """(name, slice and process that it leaves, slice and process that it reaches) of every arrow."""
    ends = defaultdict(dict)
    for e in trace["traceEvents"]:
        if e["ph"] in "sf":
            around = [
                x for x in trace["traceEvents"]
                if x["ph"] == "X" and (x["pid"], x["tid"]) == (e["pid"], e["tid"])
                and ns(x["ts"]) <= ns(e["ts"]) < ns(x["ts"] + x["dur"])
            ]  # fmt: skip
            assert len(around) == 1, "an arrow binds to exactly one slice"
            ends[e["id"]][e["ph"]] = (around[0]["cat"], e["pid"] - FIRST, e["ts"])
            ends[e["id"]]["name"] = e["name"]
    assert all(e["s"][2] < e["f"][2] for e in ends.values())
    return [(e["name"], e["s"][:2], e["f"][:2]) for e in ends.values()]


def test_golden(toy_episode):
    env = DispatchEnv(FRESH, episodes=[toy_episode])
    trace = record_timeline(env, lambda _: 1, ["slow", "fast"], seed=0)
    assert json.loads(json.dumps(trace["traceEvents"])) == json.loads(GOLDEN.read_text())
    assert trace["displayTimeUnit"] == "ms"


def test_worked_out_by_hand(toy_episode):
    """Three requests on the slow instance: iterations of 10 ms and 1 ms a token.

    Request 0 computes its 6 tokens in 1.000..1.016 and decodes 1.016..1.027; request 1 arrives at 1.020, gets
    7 of the 8 tokens of the step in which request 0 ends (1.027..1.045), and its last 3 in 1.045..1.058.
    """
    env = DispatchEnv(FRESH, episodes=[toy_episode])
    trace = record_timeline(env, lambda _: 1, ["slow", "fast"], seed=0)
    records = env.records()
    assert records.first_token_s.tolist() == pytest.approx([1.016, 1.058, 2.514])
    assert spans(trace, 0) == [
        (2, "prefill", 1.0e6, pytest.approx(1.016e6)),
        (2, "decode", pytest.approx(1.016e6), pytest.approx(1.045e6)),
    ]
    assert [phase for _, phase, _, _ in spans(trace, 1)] == ["prefill", "decode"]
    assert spans(trace, 2) == [(2, "prefill", 2.5e6, pytest.approx(2.514e6))]


requests = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 12), st.integers(1, 24)), min_size=1, max_size=12
)


@settings(max_examples=25, deadline=None)
@given(requests=requests, choices=st.lists(st.integers(0, 2), min_size=12, max_size=12))
def test_any_episode_is_a_valid_trace(toy_instance, requests, choices):
    gaps, prompts, outputs = (np.array(column) for column in zip(*requests, strict=True))
    workload = make_workload("random", np.cumsum(gaps) / 1000, prompts, outputs)
    cluster = ClusterSpec("toy", (toy_instance(1.0), toy_instance(0.5)))
    env = DispatchEnv(FRESH, episodes=[Episode(workload, cluster, workload.output_tokens)])
    answers = iter(choices)
    trace = record_timeline(env, lambda _: next(answers), ["slow", "fast"], seed=0)
    json.dumps(trace, allow_nan=False)
    check_tracks(trace)
    check_records(trace, env.records())
    check_counters(trace)
    check_questions(trace, len(workload))


def check_tracks(trace):
    last, named = {}, set()
    for e in trace["traceEvents"]:
        track = e["pid"], e["tid"]
        if e["ph"] == "M":
            named.add(track)
            continue
        if e["ph"] == "X":
            assert track in named and e["dur"] > 0
        start, end = last.get(track, (0.0, 0.0))
        assert e["ts"] >= start
        if e["ph"] == "X":
            assert ns(e["ts"]) >= ns(end), "slices of a track do not overlap"
            end = e["ts"] + e["dur"]
        last[track] = e["ts"], end


def check_records(trace, records):
    for r in range(len(records)):
        life = spans(trace, r)
        assert life[0][2] == round(records.dispatched_s[r] * 1e9) / 1000
        assert life[-1][3] == pytest.approx(records.finished_s[r] * 1e6, abs=1e-3)
        for (_, _, _, end), (_, _, start, _) in pairwise(life):
            assert start == pytest.approx(end, abs=1e-6), "no gap between two phases"
        first = round(records.first_token_s[r] * 1e9) / 1000
        decodes = [start for _, phase, start, _ in life if phase == "decode"]
        if decodes and not records.preemptions[r]:
            assert decodes[0] == first
        assert all(start >= first for start in decodes)
        assert decodes or records.output_tokens[r] == 1
        assert all(phase in ("queued", "prefill") for _, phase, start, _ in life if start < first)
        (args,) = {
            json.dumps(e["args"])
            for e in trace["traceEvents"]
            if e["ph"] == "X" and e["name"] == f"request {r}"
        }
        for name, value in json.loads(args).items():
            assert name == "request" or value == getattr(records, name)[r]
    assert sum(name == "preemption" for name, _, _ in flows(trace)) <= records.preemptions.sum()


def check_counters(trace):
    last = {}
    for e in trace["traceEvents"]:
        if e["ph"] == "C":
            values = e["args"]
            assert min(values.values()) >= 0
            assert "%" not in e["name"] or sum(values.values()) <= 100.001
            assert last.get((e["pid"], e["name"])) != values, "only changes are written"
            last[e["pid"], e["name"]] = values
    assert all(sum(values.values()) == 0 for (_, name), values in last.items() if name == "requests")


def check_questions(trace, count):
    asked = [e for e in trace["traceEvents"] if e["ph"] == "i"]
    assert len(asked) == count
    for r, e in enumerate(asked):
        chosen = next(c for c in e["args"]["candidates"] if c["candidate"] == e["args"]["candidate"])
        assert e["name"] == f"dispatch: {chosen['answer']}" and f"request {r} to " in e["name"]
        pid = spans(trace, r)[0][0]
        assert chosen["answer"].endswith(f"instance {pid - FIRST}")


def test_a_preemption_is_an_arrow_from_the_decode_to_what_computes_it_again(toy_instance):
    """40 tokens of KV for two requests of 30; a short one on the other instance asks every 20 ms."""
    arrivals = [0.0, 0.001, *(0.02 * k for k in range(1, 60))]
    workload = make_workload("tight", arrivals, [8, 8] + [1] * 59, [22, 22] + [1] * 59)
    cluster = ClusterSpec("toy", (toy_instance(1.0), toy_instance(0.5)))
    env = DispatchEnv(FRESH, episodes=[Episode(workload, cluster, workload.output_tokens)])
    answers = iter([1, 1] + [2] * 59)
    trace = record_timeline(env, lambda _: next(answers), ["slow", "fast"])
    records = env.records()
    assert records.preemptions[:2].tolist() == [0, 1]
    assert flows(trace) == [("preemption", ("decode", 0), ("prefill", 0))]
    phases = [phase for _, phase, _, _ in spans(trace, 1)]
    assert phases == ["queued", "prefill", "decode", "queued", "prefill", "decode"]
    check_records(trace, records)


def test_every_kind_of_question_and_what_comes_of_it():
    """Random answers on a tight fleet with all levers, one instance of which drains."""
    scenario = Scenario(
        workload="llumnix:256-256", clusters=("3xl40s-llama-3.1-8b",), loads=(1.2, 1.2), requests=150,
        migration=Migration(period_s=0.5), budget_period_s=0.5, engine={"swap_gib": 2.0, "kv_blocks": 600},
        drain={"2": 20.0}, scrape_s=1.0,
    )  # fmt: skip
    env = ClusterEnv(scenario, episodes=make_episodes(scenario, 1, 0), render_mode="rgb_array")
    rng = np.random.default_rng(0)
    shapes = set()

    def choose(observation):
        shapes.add(env.render().shape)
        return int(rng.choice(np.flatnonzero(observation["mask"])))

    trace = record_timeline(env, choose, ["a", "b", "c"], seed=0)
    records = env.records()
    assert len(shapes) == 1
    check_tracks(trace)
    check_records(trace, records)
    check_counters(trace)
    kinds = {e["cat"] for e in trace["traceEvents"] if e["ph"] == "i"}
    assert kinds == {"dispatch", "preempt", "migrate", "move", "budget"}
    arrows = flows(trace)
    assert all(a[1] != b[1] for name, a, b in arrows if name == "migration")
    for name, most in (("preemption", records.preemptions), ("migration", records.migrations)):
        assert 0 < sum(arrow[0] == name for arrow in arrows) <= most.sum()


def moment(now, phase, place, *, moves=(), migrations=0, streamed=True, begun=0.0):
    """Two instances and one request."""
    zeros, none = np.zeros(2, np.int64), np.zeros(2)
    return Moment(
        now_s=now, waiting=zeros, prefilling=zeros, decoding=zeros, held=none, cached=none, host=none,
        begun_s=np.full(2, begun), draining=np.zeros(2, bool), moves=moves, asked=(),
        phase=np.array([phase], np.int8), place=np.array([place], np.int32), streamed=np.array([streamed]),
        preemptions=np.zeros(1, np.int32), migrations=np.array([migrations], np.int32),
    )  # fmt: skip


def one_record(dispatched, first, finished, **counts):
    values = {name: np.zeros(1, np.int32) for name in Records.__dataclass_fields__}
    times = {
        "arrived_s": dispatched,
        "dispatched_s": dispatched,
        "first_token_s": first,
        "finished_s": finished,
    }
    return Records(**values | {name: np.array([time]) for name, time in times.items()} | counts)


def test_a_migration_is_a_copy_a_stop_and_an_arrow():
    timeline = Timeline(["a", "b"])
    timeline.add(moment(0.0, OUTSIDE, -1, streamed=False))
    timeline.add(moment(1.0, QUEUED, 0, streamed=False))
    timeline.add(moment(2.0, PREFILL, 0, streamed=False, begun=1.5))
    live = Move(0, 0, 1, "live copy", 1)
    timeline.add(moment(4.0, DECODE, 0, moves=(live,)))
    timeline.add(moment(5.0, STOPPED, 0, moves=(replace(live, copy="last copy", stage=2),), begun=4.5))
    timeline.add(moment(6.0, STOPPED, 1, migrations=1, begun=5.75))
    timeline.add(moment(7.0, DECODE, 1, migrations=1, begun=6.5))
    timeline.add(moment(9.0, OUTSIDE, 1, migrations=1))
    trace = timeline.trace(one_record(0.25, 3.0, 8.0))
    assert spans(trace, 0) == [
        (2, "queued", 0.25e6, 1.5e6),
        (2, "prefill", 1.5e6, 3e6),
        (2, "decode", 3e6, 4.5e6),
        (2, "stopped", 4.5e6, 5.75e6),
        (3, "stopped", 5.75e6, 6.5e6),
        (3, "decode", 6.5e6, 8e6),
    ]
    assert flows(trace) == [("migration", ("stopped", 0), ("stopped", 1))]
    (copy,) = [e for e in trace["traceEvents"] if e["tid"] == COPIES and e["ph"] == "X"]
    assert (copy["ts"], copy["dur"], copy["pid"]) == (4e6, 2e6, FIRST)
    assert copy["args"] == {"request": 0, "source": 0, "target": 1, "copy": "last copy", "stage": 2}
    check_tracks(trace)


def test_a_prefill_that_no_question_saw_begins_after_the_last_that_saw_it_queued():
    timeline = Timeline(["a", "b"])
    timeline.add(moment(0.0, OUTSIDE, -1, streamed=False))
    timeline.add(moment(1.0, QUEUED, 0, streamed=False))
    timeline.add(moment(2.0, QUEUED, 0, streamed=False))
    timeline.add(moment(9.0, OUTSIDE, 0))
    life = spans(timeline.trace(one_record(0.0, 3.0, 8.0)), 0)
    assert life == [(2, "queued", 0.0, 2e6), (2, "prefill", 2e6, 3e6), (2, "decode", 3e6, 8e6)]
