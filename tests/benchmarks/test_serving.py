"""How the serving benchmarks count: whole answers, fates of requests, percentiles, Prometheus pages."""

import pytest

ANSWER = {
    "streamed": True,
    "asked": 10,
    "begin": 0.0,
    "first": 0.1,
    "end": 1.0,
    "tokens": 10,
    "engine": "engine-1",
    "status": 200,
    "ended": True,
    "error": None,
}


@pytest.fixture
def benchmarks(monkeypatch):
    """The modules as the benchmarks import them."""
    import importlib
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    pytest.importorskip("prometheus_client")
    return importlib.import_module


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "answered"),
        ({"streamed": False}, "answered"),
        ({"tokens": 9}, "cut"),
        ({"ended": False}, "cut"),
        ({"tokens": 0, "ended": False}, "lost"),
        ({"streamed": False, "tokens": 9}, "lost"),
        ({"status": 503, "tokens": 0}, "refused"),
        ({"status": 504, "tokens": 0}, "refused"),
        ({"status": 500, "tokens": 0}, "lost"),
        ({"status": 0, "tokens": 0, "error": "ConnectionError"}, "lost"),
        ({"tokens": 11}, "cut"),
    ],
)
def test_fates(benchmarks, changes, expected):
    assert benchmarks("engine_loss").fate({**ANSWER, **changes}) == expected


def test_outcome_of_a_kill(benchmarks):
    answers = [
        {**ANSWER, "end": 0.4},
        {**ANSWER, "end": 2.5},
        {**ANSWER, "end": 0.6, "ended": False, "tokens": 3},
        {**ANSWER, "begin": 0.7, "end": 1.2, "status": 0, "tokens": 0},
        {**ANSWER, "begin": 1.0, "end": 1.5},
    ]
    row = benchmarks("engine_loss").outcome(answers, 0.5)
    assert (row["sent"], row["answered"], row["cut"], row["lost"], row["refused"]) == (5, 3, 1, 1, 0)
    assert (row["in_flight_at_kill"], row["sent_after_kill"]) == (2, 2)
    assert row["sent_after_kill_and_not_answered"] == 1
    assert row["recovered_s"] == 2.0
    assert row["last_failure_s"] == pytest.approx(0.7)


def test_a_kill_that_met_nobody_is_no_measurement(benchmarks):
    with pytest.raises(SystemExit):
        benchmarks("engine_loss").outcome([ANSWER], 5.0)


def test_summary_counts_whole_answers_within_the_time(benchmarks):
    answers = [{**ANSWER, "begin": 10 + i, "first": 10.2 + i, "end": 11.0 + i} for i in range(4)]
    answers += [{**ANSWER, "begin": 10, "first": None, "end": 11, "status": 0, "tokens": 0}]
    row = benchmarks("serving.clients").summary(answers, 3.0)
    assert (row["requests"], row["failed"]) == (5, 1)
    assert row["requests_per_s"] == pytest.approx(1.0)
    assert row["tokens_per_s"] == pytest.approx(10.0)
    assert row["ttft_p50_ms"] == pytest.approx(200)
    assert row["e2e_p99_ms"] == pytest.approx(1000)


def test_prometheus_page(benchmarks):
    page = '# HELP a b\na_total{x="1",y="z z"} 2\na_total{x="2"} 3.5\nb 1e3\n'
    values = benchmarks("serving.fronts").counters(page)
    assert values["a_total"] == 5.5
    assert values['a_total{x="2"}'] == 3.5
    assert values["b"] == 1000


def test_cpu_time_of_a_process(benchmarks):
    import os
    import time

    cpu_s = benchmarks("serving.fronts").cpu_s
    before = cpu_s(os.getpid())
    until = time.process_time() + 0.1
    while time.process_time() < until:
        pass
    assert 0.05 <= cpu_s(os.getpid()) - before <= 0.3
