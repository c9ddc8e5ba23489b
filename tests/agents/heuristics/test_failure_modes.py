"""Failures that users of real routers met, each replayed on a small cluster of fake observations."""

from __future__ import annotations

from collections import Counter, deque

import numpy as np
import pytest

from servegym.agents.heuristics import make_heuristic

PROMPT = 1000


class Cluster:
    """Three instances; a request stays for `stay` arrivals and prefills for `prefill`; scrapes are fresh."""

    def __init__(self, observe, stay=24, prefill=3, slots=8):
        self.observe, self.stay, self.prefill, self.slots = observe, stay, prefill, slots
        self.sent: deque[int] = deque(maxlen=stay)

    def play(self, rule, requests, hits, legal=None):
        """Instance of each request; `hits(sent)` gives the cached tokens at each instance."""
        rule.reset(1, 0)
        chosen = []
        for _ in range(requests):
            instance = int(rule.act(self.look(hits(self.sent), legal))[0]) - 1
            self.sent.append(instance)
            chosen.append(instance)
        return chosen

    def look(self, hits, legal):
        inflight = np.bincount(list(self.sent), minlength=3)
        prefilling = np.bincount(list(self.sent)[-self.prefill :], minlength=3) * PROMPT
        uncached = PROMPT - np.asarray(hits)
        return self.observe(
            {
                "running": np.minimum(inflight, self.slots),
                "waiting": np.maximum(inflight - self.slots, 0),
                "kv_usage": np.minimum(inflight, self.slots) / self.slots,
                "inflight": inflight,
                "inflight_prefill_tokens": prefilling,
                "inflight_context_tokens": inflight * PROMPT,
                "inflight_predicted_tokens": inflight * 100,
                "kv_capacity_tokens": [self.slots * PROMPT] * 3,
                "decode_step_s": 0.02 + 0.001 * inflight,
            },
            {"prompt_tokens": PROMPT, "predicted_output_tokens": 100},
            {
                "prefix_hit_tokens": hits,
                "queue_s": prefilling * 1e-4,
                "prefill_s": uncached * 1e-4,
                "step_after_s": 0.021 + 0.001 * inflight,
            },
            overall={"since_last_arrival_s": 1.0},
            legal=legal,
        )


def largest_share(chosen):
    return max(Counter(chosen).values()) / len(chosen)


def shared_prompt(sent):
    """80% of each prompt is one system prompt, cached at instance 0 and wherever a request has gone."""
    return [800 if instance == 0 or instance in sent else 0 for instance in range(3)]


# Dynamo issue 737.
@pytest.mark.parametrize(
    "rule",
    [
        make_heuristic("dynamo"),
        make_heuristic("lmetric"),
        make_heuristic("llmd"),
        make_heuristic("mooncake"),
        make_heuristic("least_work_predicted"),
        make_heuristic("sglang_cache_aware", abs_threshold=8.0),
    ],
    ids=lambda rule: rule.name,
)
def test_shared_system_prompt_spreads_when_load_grows(observe, rule):
    assert largest_share(Cluster(observe).play(rule, 120, shared_prompt)) < 0.6


def test_shared_system_prompt_without_a_balance_threshold_floods_one_instance(observe):
    """The failure itself: this is what the test above can see."""
    rule = make_heuristic("sglang_cache_aware", abs_threshold=1e6)
    only_first = [800, 0, 0]
    assert largest_share(Cluster(observe).play(rule, 120, lambda _: only_first)) == 1.0


# smg issue 1621.
def test_token_counts_see_the_kv_saturation_that_request_counts_do_not(observe):
    obs = observe(
        {
            "running": [2, 5, 6],
            "inflight": [2, 5, 6],
            "kv_usage": [0.98, 0.25, 0.30],
            "inflight_context_tokens": [98_000, 25_000, 30_000],
            "kv_capacity_tokens": [100_000] * 3,
        },
        {"prompt_tokens": 2000},
    )
    answers = {}
    names = ("least_request", "vllm_dp", "least_tokens", "llmd", "dynamo", "infaas", "llumnix")
    for name in names:
        rule = make_heuristic(name)
        rule.reset(1, 0)
        answers[name] = int(rule.act(obs)[0])
    blind = {name for name, answer in answers.items() if answer == 1}
    assert blind == {"least_request", "vllm_dp"}


# SGLang issues 14305 and 14532.
def test_unmatched_prompts_do_not_bury_an_instance_with_an_empty_cache(observe):
    """Instance 2 has restarted: nothing is cached there, some of each prompt is elsewhere, none above 0.5."""
    rule = make_heuristic("sglang_cache_aware")
    chosen = Cluster(observe).play(rule, 120, lambda _: [400, 300, 0])
    assert all(0.3 < count / len(chosen) < 0.4 for count in Counter(chosen).values())
    assert len(set(chosen)) == 3


# SGLang issue 32195.
def test_imbalance_elsewhere_costs_affinity_only_under_thresholds(observe):
    """Instance 1 holds the whole prefix and little load; instance 2 is overloaded."""
    obs = observe(
        {
            "inflight": [0, 2, 40],
            "inflight_context_tokens": [0, 1500, 60_000],
            "inflight_prefill_tokens": [0, 0, 9000],
        },
        {"prompt_tokens": 8000},
        {
            "prefix_hit_tokens": [0, 7900, 0],
            "queue_s": [0.0, 0.0, 0.9],
            "prefill_s": [0.8, 0.01, 0.8],
        },
    )
    answers = {}
    for name in ("sglang_cache_aware", "dynamo", "lmetric", "mooncake"):
        rule = make_heuristic(name)
        rule.reset(1, 0)
        answers[name] = int(rule.act(obs)[0])
    assert answers == {"sglang_cache_aware": 1, "dynamo": 2, "lmetric": 2, "mooncake": 2}


@pytest.mark.parametrize("name", ["sglang_cache_aware", "dynamo", "lmetric", "llmd", "session_affinity"])
def test_a_dead_instance_gets_nothing_whatever_it_caches(observe, name):
    chosen = Cluster(observe).play(make_heuristic(name), 40, lambda _: [1000, 0, 0], legal=[0, 1, 1])
    assert set(chosen) == {1, 2}
