"""Every rule against choices worked out by hand from its published formula."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.agents.heuristics import make_heuristic
from servegym.errors import InputError

INSTANCES = {
    "running": [6, 2, 3],
    "waiting": [0, 3, 1],
    "kv_usage": [0.3, 0.1, 0.4],
    "inflight": [6, 5, 4],
    "inflight_prefill_tokens": [0, 900, 300],
    "inflight_context_tokens": [3000, 2000, 5000],
    "inflight_predicted_tokens": [600, 1000, 100],
    "kv_capacity_tokens": [10_000, 10_000, 10_000],
    "decode_step_s": [0.03, 0.02, 0.04],
    "decode_tokens_per_s": [500, 250, 100],
}
REQUEST = {"prompt_tokens": 1000, "predicted_output_tokens": 100}
EDGES = {
    "prefix_hit_tokens": [0, 600, 200],
    "queue_s": [0.0, 0.09, 0.03],
    "prefill_s": [0.10, 0.04, 0.08],
    "step_after_s": [0.035, 0.024, 0.05],
    "session_last": [1, 0, 0],
}


def answer(rule, obs) -> int:
    rule.reset(1, 0)
    return int(rule.act(obs)[0])


@pytest.mark.parametrize(
    ("name", "params", "expected"),
    [
        ("default", {}, 0),
        ("least_request", {}, 3),  # 6, 5, 4
        ("least_tokens", {}, 2),  # 3000, 2000, 5000
        ("session_affinity", {}, 1),
        ("vllm_dp", {}, 1),  # 6, 14, 7
        ("vllm_dp", {"waiting_weight": 0}, 2),  # 6, 2, 3
        ("sglang_cache_aware", {}, 2),  # spread 2 <= 32; matches 0, 0.6, 0.2
        ("sglang_cache_aware", {"match_threshold": 0.7}, 3),  # no match: loads 6, 5, 4
        ("sglang_cache_aware", {"abs_threshold": 1}, 3),  # 2 > 1 and 6 > 1.1 * 4: loads
        ("sglang_cache_aware", {"abs_threshold": 1, "rel_threshold": 1.5}, 2),  # 6 > 6 is false: matches
        ("llmd", {}, 2),  # 2+1.4+0 = 3.4, 0+1.8+1.8 = 3.6, 1.33+1.2+0.6 = 3.13
        ("llmd", {"prefix_weight": 1}, 1),  # 3.4, 2.4, 2.73
        ("llmd", {"queue_weight": 0, "prefix_weight": 0}, 2),  # 1.4, 1.8, 1.2
        ("dynamo", {}, 2),  # 1000+4000, 1300+3000, 1100+6000
        ("dynamo", {"overlap_weight": 4}, 1),  # 8000, 8200, 10400
        ("lmetric", {}, 3),  # 1000*7, 1300*6, 1100*5
        ("infaas", {}, 2),  # 6900/6, 8900/2, 5900/3
        ("mooncake", {}, 1),  # 0.10, 0.13, 0.11
        # left 1.2, 4.09, 1.03; own 0.1+0.2, 0.04+0.4, 0.08+1.0
        ("least_work_predicted", {}, 1),
        ("least_work_oracle", {}, 1),  # 1.0+0.3, 1.4+0.44, 0.9+1.08
    ],
)
def test_formula(observe, name, params, expected):
    obs = observe(INSTANCES, REQUEST, EDGES, oracle=[1.0, 1.4, 0.9])
    assert answer(make_heuristic(name, **params), obs) == expected


@pytest.mark.parametrize(
    ("waiting", "context", "expected"),
    [
        # One waiting request of 8,500 tokens. INFaaS 5900/4, 8900/1, 3900/3; paper 6000/4, (9000-8500)/1,
        # 4000/3; artifact 5900/4, 400/2, 3900/3.
        (1, 9500, {"infaas": 2, "paper": 1, "artifact": 1}),
        # Nine waiting requests of 8,000 tokens in all. Paper (9000-8000/9)/1; artifact 900/10.
        (9, 9000, {"infaas": 2, "paper": 2, "artifact": 1}),
    ],
)
def test_freeness_and_the_queue(observe, waiting, context, expected):
    obs = observe(
        {
            "running": [4, 1, 3],
            "waiting": [0, waiting, 0],
            "kv_usage": [0.4, 0.1, 0.6],
            "inflight": [4, 1 + waiting, 3],
            "inflight_context_tokens": [4000, context, 6000],
            "kv_capacity_tokens": [10_000] * 3,
        }
    )
    rules = {
        "infaas": make_heuristic("infaas"),
        "paper": make_heuristic("dispatch_llumnix", mode="paper"),
        "artifact": make_heuristic("dispatch_llumnix", mode="artifact"),
    }
    assert {name: answer(rule, obs) for name, rule in rules.items()} == expected


@pytest.mark.parametrize("name", ["infaas", "dispatch_llumnix"])
def test_idle_instance_has_infinite_freeness(observe, name):
    obs = observe(
        {
            "running": [1, 0, 0],
            "inflight": [1, 0, 0],
            "kv_usage": [0.0, 0.0, 0.0],
            "kv_capacity_tokens": [90_000, 10, 20],
        }
    )
    assert answer(make_heuristic(name), obs) == 2


def test_llmd_gives_equal_queues_the_same_score(observe):
    obs = observe({"waiting": [5, 5, 5], "kv_usage": [0.3, 0.2, 0.4]}, {"prompt_tokens": 10})
    assert answer(make_heuristic("llmd"), obs) == 2


def test_sglang_breaks_equal_matches_by_load(observe):
    obs = observe({"inflight": [9, 4, 1]}, {"prompt_tokens": 100}, {"prefix_hit_tokens": [80, 80, 0]})
    assert answer(make_heuristic("sglang_cache_aware"), obs) == 2


def test_sglang_takes_a_match_only_above_the_threshold(observe):
    obs = observe({"inflight": [9, 4]}, {"prompt_tokens": 100}, {"prefix_hit_tokens": [50, 0]})
    assert answer(make_heuristic("sglang_cache_aware"), obs) == 2


def test_session_affinity_falls_back_to_the_shortest_queue(observe):
    rule = make_heuristic("session_affinity")
    edges = {"session_last": [0, 0, 1]}
    assert answer(rule, observe({"inflight": [2, 1, 9]}, edges=edges)) == 3
    assert answer(rule, observe({"inflight": [2, 1, 9]}, edges=edges, legal=[1, 1, 0])) == 2
    assert answer(rule, observe({"inflight": [2, 1, 9]})) == 2


def test_vllm_dp_counts_its_own_requests_until_the_next_scrape(observe):
    rule = make_heuristic("vllm_dp")
    rule.reset(1, 0)

    def act(age, since_last):
        obs = observe(INSTANCES | {"scrape_age": age}, overall={"since_last_arrival_s": since_last})
        return int(rule.act(obs)[0])

    # 6, 14, 7 -> 10, 14, 7 -> 10, 14, 11 -> 14, 14, 11
    assert [act([0.02 * k + 0.01] * 3, 0.005) for k in range(4)] == [1, 3, 1, 3]
    # Instance 0 was scraped at a younger age: 6, 14, 15.
    assert [act([0.01 + 0.005 * k, 0.09, 0.09], 0.005) for k in range(3)] == [1, 1, 1]
    # All were scraped since the last decision, though some are older than at that decision: not 18, 14, 15.
    assert act([0.2, 0.2, 0.2], 0.3) == 1
    # A scrape of instance 2 only; instance 0 has one request on top: 10, 14, 7.
    assert act([0.21, 0.21, 0.001], 0.01) == 3


def test_vllm_dp_adds_nothing_to_counts_that_are_never_stale(observe):
    rule = make_heuristic("vllm_dp")
    rule.reset(1, 0)
    obs = observe(INSTANCES | {"scrape_age": [0, 0, 0]}, overall={"since_last_arrival_s": 0.005})
    assert [int(rule.act(obs)[0]) for _ in range(4)] == [1, 1, 1, 1]  # 6, 14, 7


def test_round_robin_cycles_over_the_legal_instances(observe):
    rule = make_heuristic("round_robin")
    rule.reset(1, 0)
    masks = [[1, 1, 1]] * 4 + [[0, 0, 0], [1, 1, 1], [1, 1, 0], [0, 1, 0]]
    answers = [int(rule.act(observe({"inflight": [0, 0, 0]}, legal=mask))[0]) for mask in masks]
    assert answers == [1, 2, 3, 1, 0, 2, 1, 2]


def test_round_robin_counts_each_lane_for_itself(observe):
    rule = make_heuristic("round_robin")
    rule.reset(2, 0)
    first = observe({"inflight": [0, 0, 0]}, legal=[1, 1, 1])
    second = observe({"inflight": [0, 0, 0]}, legal=[0, 0, 1])
    both = {key: np.concatenate([first[key], second[key]]) for key in first}
    assert [rule.act(both).tolist() for _ in range(3)] == [[1, 3], [2, 3], [3, 3]]


def _frequencies(rule, obs, lanes=6000):
    rule.reset(lanes, 7)
    batch = {key: np.repeat(value, lanes, axis=0) for key, value in obs.items()}
    return np.bincount(rule.act(batch), minlength=5) / lanes


def test_random_is_uniform_over_the_legal_instances(observe):
    share = _frequencies(make_heuristic("random"), observe({"inflight": [9, 1, 5, 0]}, legal=[1, 1, 0, 1]))
    assert share[[0, 3]].tolist() == [0, 0]
    # Four standard deviations of a binomial share.
    assert share[[1, 2, 4]] == pytest.approx(1 / 3, abs=4 * np.sqrt(2 / 9 / 6000))


def test_power_of_two_takes_the_better_of_two_distinct_draws(observe):
    share = _frequencies(make_heuristic("power_of_two"), observe({"inflight": [1, 2, 3, 9]}))
    # Of the six pairs, instance 0 wins three, 1 wins two, 2 wins one and 3 none.
    assert share == pytest.approx([0, 1 / 2, 1 / 3, 1 / 6, 0], abs=4 * np.sqrt(1 / 4 / 6000))


@pytest.mark.parametrize("name", ["power_of_two", "llmd", "dynamo"])
def test_published_random_ties_are_uniform(observe, name):
    obs = observe({"inflight": [0, 0, 0, 0]}, {"prompt_tokens": 10}, legal=[1, 0, 1, 1])
    share = _frequencies(make_heuristic(name), obs)
    assert share == pytest.approx([0, 1 / 3, 0, 1 / 3, 1 / 3], abs=4 * np.sqrt(2 / 9 / 6000))


@pytest.mark.parametrize("name", ["mooncake", "least_work_predicted", "least_work_oracle"])
def test_idle_mixed_fleet_prefers_the_fast_instance(observe, name):
    edges = {"prefill_s": [0.2, 0.1, 0.3], "step_after_s": [0.02, 0.01, 0.03]}
    obs = observe({"inflight": [0, 0, 0]}, REQUEST, edges, oracle=[0.0, 0.0, 0.0])
    assert answer(make_heuristic(name), obs) == 2


def test_infinite_costs_stay_legal(observe):
    obs = observe(INSTANCES, REQUEST, EDGES, legal=[0, 1, 1], oracle=[np.inf] * 3)
    assert answer(make_heuristic("least_work_oracle"), obs) == 2


def test_large_counts_do_not_round_into_ties(observe):
    # The products differ in the eighth digit, which float32 does not hold.
    obs = observe(
        {"inflight": [4095, 4095], "inflight_prefill_tokens": [100_000, 99_999]}, {"prompt_tokens": 8000}
    )
    assert answer(make_heuristic("lmetric"), obs) == 2


def test_oracle_rule_names_what_it_lacks(observe):
    rule = make_heuristic("least_work_oracle")
    rule.reset(1, 0)
    with pytest.raises(InputError, match="oracle=True"):
        rule.act(observe(INSTANCES, REQUEST, EDGES))
