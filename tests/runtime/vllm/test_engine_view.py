"""The view of an engine from its scheduler's requests, without vLLM."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from servegym.runtime.decider import Decider
from servegym.runtime.fleet import InstanceSettings
from servegym.runtime.questions import Preempt, ask_preempt
from servegym.runtime.vllm.engine_view import EngineView


def request(name: str, **fields: Any) -> SimpleNamespace:
    values = {
        "arrival_time": time.time(), "num_prompt_tokens": 100, "max_tokens": 50, "priority": 0,
        "sampling_params": SimpleNamespace(extra_args=None), "num_output_tokens": 0,
        "num_computed_tokens": 0, "is_prefill_chunk": False,
    }  # fmt: skip
    return SimpleNamespace(request_id=name, **{**values, **fields})


def engine() -> EngineView:
    settings = InstanceSettings.of(
        "a100-llama-3.1-8b", kv_blocks=12, block_tokens=128, max_seqs=16, token_budget=2048, queue="priority"
    )
    return EngineView(settings, 1024)


def blocks(*holders: int) -> list[SimpleNamespace]:
    return [SimpleNamespace(ref_cnt=count) for count in holders]


def test_progress_is_read_when_a_question_is_asked():
    view = engine()
    a, b = request("a"), request("b", max_tokens=20, priority=3)
    for one in (a, b):
        view.arrived(one)
    a.num_output_tokens, a.num_computed_tokens = 7, 106
    b.num_computed_tokens, b.is_prefill_chunk = 64, True
    cluster = view.look([a, b], 4, {"a": blocks(2, 2, 1, 2)})
    instance = cluster.instances[0]
    first, second = instance.running
    assert (first.streamed_tokens, first.kv_tokens, first.decoding, first.admitted) == (7, 106, True, 1)
    assert (second.streamed_tokens, second.kv_tokens, second.decoding, second.admitted) == (0, 64, False, 2)
    assert first.shared_blocks == 2 and second.shared_blocks == 0  # the leading ones
    assert second.priority == 3 and instance.free_blocks == 4
    assert instance.streamed_tokens == 7 and instance.prefill_tokens == 100


def test_who_gave_way_is_admitted_anew_and_who_ended_is_forgotten():
    view = engine()
    a, b = request("a"), request("b")
    for one in (a, b):
        view.arrived(one)
    view.look([a, b], 0, {})
    a.num_output_tokens = 5
    view.preempted(a)
    view.finished(b)
    view.finished(b)
    view.scrape(1, 1, 0.5)
    (row,) = view.look([a], 0, {}).instances[0].running
    assert (row.preemptions, row.admitted, row.streamed_tokens) == (1, 3, 5)
    assert list(view.view.instances[0].inflight) == ["a"]
    view.finished(a)
    instance = view.view.instances[0]
    assert instance.prompt_tokens == instance.streamed_tokens == instance.predicted_tokens == 0


def test_who_is_next_waits_before_the_others():
    view = engine()
    a, b, c, d = some = [request(name) for name in "abcd"]
    for one in some:
        view.arrived(one)
    view.look([a, b], 0, {})
    view.look_at_waiting(d)
    waiting = view.view.instances[0].waiting
    assert [row.key for row in waiting] == ["d", "c"]
    b.num_output_tokens = 3
    view.preempted(b)
    view.look([a, c], 0, {})
    view.look_at_waiting(b)
    waiting = view.view.instances[0].waiting
    assert [(row.key, row.streamed_tokens) for row in waiting] == [("b", 3), ("d", 0)]
    view.look([a, b, c, d], 0, {})
    view.look_at_waiting(None)
    assert view.view.instances[0].waiting == []


def test_what_clients_say_and_what_answers_teach():
    view = engine()
    hinted = request("h", sampling_params=SimpleNamespace(extra_args={"predicted_tokens": 30, "weight": 2}))
    view.arrived(hinted)
    assert view.left_tokens(hinted) == 30
    view.arrived(request("a"))
    assert view.left_tokens(request("a")) == 50  # nothing is known but max_tokens
    hinted.num_output_tokens = 8
    assert view.left_tokens(hinted) == 22
    view.finished(hinted)
    cut = request("cut", num_output_tokens=1)
    view.arrived(cut)
    view.finished(cut, is_whole=False)  # teaches nothing
    view.arrived(request("b"))
    assert view.left_tokens(request("b")) == 8
    assert view.left_tokens(request("unknown")) == 50
    assert view.view.instances[0].inflight["a"].weight == 1.0


def test_scrapes_are_as_old_as_a_routers():
    view = engine()
    view.scrape(3, 1, 0.25)
    view.view.instances[0].scraped_at_s -= 1.0
    view.preempted(request("a"))
    view.scrape(5, 2, 0.5)
    view.scrape(9, 9, 0.9)
    instance = view.view.instances[0]
    assert (instance.seen_running, instance.seen_waiting, instance.seen_kv_usage) == (5, 2, 0.5)
    assert instance.seen_preemptions == 1


def test_an_arrival_is_as_old_as_vllm_says():
    view = engine()
    view._start -= 100.0
    for name, age_s, expected_s in (("old", 1e4, 0.0), ("young", 5.0, 95.0), ("unborn", -1e4, 100.0)):
        view.arrived(request(name, arrival_time=time.time() - age_s))
        row = view.view.instances[0].inflight[name]
        assert row.arrived_s == pytest.approx(expected_s, abs=2.0) and row.arrived_s <= view.now()


def test_a_clock_that_is_set_back_or_forth_disturbs_nothing(monkeypatch):
    view, wall_s = engine(), time.time()
    for name, set_s in (("a", 0.0), ("b", -3 * 3600.0), ("c", 9 * 3600.0), ("d", 0.0)):
        waits = request(f"{name} before", arrival_time=time.time())  # as vLLM reads it
        monkeypatch.setattr(time, "time", lambda set_s=set_s: wall_s + set_s)
        for one in (waits, request(name)):
            view.arrived(one)
    rows = view.view.instances[0].inflight.values()
    assert len(rows) == 8 and all(0 <= row.arrived_s <= view.now() < 60 for row in rows)


def test_a_rule_chooses_from_it():
    view = engine()
    some = [request(str(k), num_computed_tokens=100 + (k * 7) % 10, num_output_tokens=1) for k in range(10)]
    for one in some:
        view.arrived(one)
    decider = Decider("victim_largest", budget_s=30.0)
    question = ask_preempt(view.look(some, 0, {}), 0)
    assert question.actions[0] == Preempt("9", swap=False)  # vLLM's own: the last arrival
    assert decider.decide(question) == Preempt("7", swap=False)  # 109 tokens
