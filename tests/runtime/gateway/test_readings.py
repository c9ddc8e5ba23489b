import pytest

from servegym.runtime.gateway.readings import Load, Reading, parse_load, parse_metrics
from tests.runtime.gateway.engines import METRICS

FINE = METRICS.format(running=3, waiting=2, usage=0.25, preemptions=7, blocks=64)


def test_vllm_s_metrics():
    assert parse_metrics(FINE) == Reading(3.0, 2.0, 0.25, 7.0, 64, 16)


def test_engines_behind_one_address_add_up():
    other = METRICS.format(running=1, waiting=0, usage=0.75, preemptions=1, blocks=36)
    both = FINE + other.replace('engine="0"', 'engine="1"')
    assert parse_metrics(both) == Reading(4.0, 2.0, 0.5, 8.0, 100, 16)


def test_a_cache_that_is_not_told_and_usage_beyond_the_whole():
    text = "\n".join(line for line in FINE.splitlines() if "cache_config" not in line)
    assert parse_metrics(text.replace("0.25", "1.5")) == Reading(3.0, 2.0, 1.0, 7.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<html>busy</html>",
        FINE.replace(" 3\n", " NaN\n"),
        FINE.replace(" 2\n", " -1\n"),
        FINE.replace(" 2\n", " many\n"),
        FINE.replace(" 7\n", " +Inf\n"),
        FINE.replace("vllm:kv_cache_usage_perc", "vllm:other"),
        FINE.replace("vllm:num_requests_waiting", "vllm:other"),
    ],
)
def test_metrics_that_cannot_be_are_refused(text):
    with pytest.raises(ValueError, match=r"missing| is |could not convert"):
        parse_metrics(text)


PACE = """vllm:time_to_first_token_seconds_count{engine="0"} 4
vllm:generation_tokens_total{engine="0"} 1e11
vllm:inter_token_latency_seconds_bucket{engine="0",le="0.01"} 5
vllm:inter_token_latency_seconds_sum{engine="0"} 2.5
"""


def test_the_pace_of_engines_that_tell_it():
    reading = parse_metrics(FINE + PACE)
    assert reading == Reading(3.0, 2.0, 0.25, 7.0, 64, 16, begun=4.0, generated=1e11, decoding_s=2.5)
    assert reading.decoded == 1e11 - 4


@pytest.mark.parametrize("lie", ["NaN", "-1", "1e99", "much"])
def test_a_pace_that_cannot_be_is_not_told_and_the_rest_is(lie):
    assert parse_metrics(FINE + PACE.replace("2.5", lie)) == parse_metrics(FINE)


def test_load_reports():
    report = '{"named_metrics": {"kv_cache_usage_perc": 0.4, "num_requests_waiting": 3.0}}'
    assert parse_load(f"JSON {report}") == Load(3.0, 0.4)
    text = "TEXT named_metrics.kv_cache_usage_perc=0.4, named_metrics.num_requests_waiting=3.0"
    assert parse_load(text) == Load(3.0, 0.4)
    assert parse_load("TEXT named_metrics.other=1") == Load()


@pytest.mark.parametrize(
    "header",
    ["", "JSON", "JSON []", "JSON {", "JSON " + "[" * 9999, "TEXT a=b=c", 'JSON {"named_metrics": [1]}',
     'JSON {"named_metrics": {"num_requests_waiting": "NaN"}}', "TEXT named_metrics.kv_cache_usage_perc=-1"],
)  # fmt: skip
def test_load_reports_that_cannot_be_tell_nothing(header):
    assert parse_load(header) == Load()
