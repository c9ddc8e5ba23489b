"""validate: its table and rank correlations on records whose answer is known, and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest

from servegym.agents.heuristics import make_heuristic
from servegym.agents.play import play
from servegym.envs.cluster.spec import ClusterSpec, InstanceSpec
from servegym.envs.scenario import Scenario
from servegym.errors import InputError
from servegym.runtime.validate import (
    FIGURES,
    Comparison,
    Validation,
    as_json,
    make_episode,
    rank_correlation,
    validate,
)

SCENARIO = Scenario(scrape_s=0.0)
NAMES = ("round_robin", "least_request", "least_tokens", "random", "mooncake", "session_affinity")


class Mirror:
    """Engines that do what the model says, `slow` times slower; each play adds `jitter` of the time to it."""

    def __init__(self, slow=1.0, jitter=0.0, harm=lambda records: records):
        self.slow, self.jitter, self.harm, self.played = slow, jitter, harm, []
        self.counts = {"answered": 79, "timeout": 1}

    def play(self, policy, scenario, episode, seed=0):
        self.played.append(policy.name)
        factor = self.slow * (1 + self.jitter * self.played.count(policy.name))
        records = play(policy, scenario, [episode], 1, seed)[0]
        start = records.arrived_s
        later = {
            name: start + factor * (getattr(records, name) - start)
            for name in ("dispatched_s", "first_token_s", "finished_s")
        }
        return self.harm(replace(records, **later))


@pytest.fixture(scope="module")
def fleet():
    spec = InstanceSpec("h100-llama-3.1-8b", max_seqs=8, token_budget=512)
    return ClusterSpec("2 engines", (spec, replace(spec, profile="a100-llama-3.1-8b")))


@pytest.fixture(scope="module")
def episode(fleet):
    return make_episode(fleet, "azure2023_conv", SCENARIO, requests=80, load_fraction=1.2, length_scale=0.2)


def compared(player, episode, repeats=2):
    return validate(player, [make_heuristic(n) for n in NAMES], SCENARIO, episode, repeats=repeats)


def test_engines_that_do_what_the_model_says_show_no_error(episode):
    found = compared(Mirror(), episode)
    assert found.largest_error() == pytest.approx(0, abs=1e-9)
    assert found.largest_spread() == pytest.approx(0, abs=1e-9)
    assert found.agreement("e2e_mean_s") == {"spearman": pytest.approx(1), "kendall": pytest.approx(1)}
    assert found.requests == 80


def test_engines_that_are_slower_by_a_quarter_are_predicted_a_fifth_too_fast(episode):
    found = compared(Mirror(slow=1.25), episode)
    for comparison in found.comparisons:
        for figure in FIGURES:
            assert comparison.error(figure) == pytest.approx(-20)
    assert found.largest_error() == pytest.approx(20)
    assert found.agreement("ttft_p99_s")["spearman"] == pytest.approx(1)


def test_spread_is_how_far_the_plays_of_one_policy_lie_apart(episode):
    found = compared(Mirror(jitter=0.1), episode, repeats=3)  # 1.1, 1.2 and 1.3 times as slow
    assert found.comparisons[0].spread("e2e_p50_s") == pytest.approx(100 * 0.2 / 1.2)
    assert found.comparisons[0].error("e2e_p50_s") == pytest.approx(100 * (1 / 1.2 - 1))


def test_each_repeat_plays_every_policy_once_in_an_order_of_its_own(episode):
    player = Mirror()
    compared(player, episode, repeats=3)
    rounds = [player.played[k : k + 6] for k in (0, 6, 12)]
    assert all(sorted(one) == sorted(NAMES) for one in rounds)
    assert rounds[0] != rounds[1]


@pytest.mark.parametrize(
    "harm",
    [
        lambda r: replace(r, finished_s=np.where(np.arange(len(r)) == 3, np.nan, r.finished_s)),
        lambda r: replace(r, output_tokens=r.output_tokens + 1),
    ],
)
def test_a_lost_request_or_a_wrong_answer_is_no_result(episode, harm):
    with pytest.raises(RuntimeError, match="unfinished"):
        compared(Mirror(harm=harm), episode)


def test_decisions_of_the_fallback_are_counted_over_the_plays(episode):
    found = compared(Mirror(), episode, repeats=2)
    assert found.comparisons[0].decisions == {"answered": 158, "timeout": 2}
    assert as_json(found)["policies"][0]["decisions"]["timeout"] == 2


def test_rank_correlation_by_hand():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == {"spearman": 1.0, "kendall": 1.0}
    assert rank_correlation([1, 2, 3], [3, 2, 1])["spearman"] == pytest.approx(-1)
    assert rank_correlation([1, 2, 3, 4], [1, 2, 4, 3])["kendall"] == pytest.approx(4 / 6)
    assert np.isnan(rank_correlation([1, 1], [1, 2])["kendall"])


def test_json_has_no_nan():
    metrics = dict.fromkeys(FIGURES, 1.0) | {"e2e_mean_s": 2.0, "tpot_mean_s": float("nan")}
    one = Comparison("alone", {name: np.array([value]) for name, value in metrics.items()}, metrics)
    data = as_json(Validation((one,), 1.0, 10))
    assert data["rank_correlation"]["e2e_mean_s"] == {"spearman": None, "kendall": None}
    assert data["policies"][0]["metrics"]["tpot_mean_s"] == {"measured": [None], "predicted": None}
    assert data["policies"][0]["spread_percent"]["e2e_p50_s"] is None


def test_an_episode_has_the_load_and_lengths_that_were_asked_for(fleet):
    low, high = (
        make_episode(fleet, "fixed:1000-200", SCENARIO, requests=60, load_fraction=load, length_scale=0.1)
        for load in (0.5, 1.0)
    )
    assert set(low.workload.prompt_tokens) == {100} and set(low.workload.output_tokens) == {20}
    assert high.workload.rate_rps == pytest.approx(2 * low.workload.rate_rps)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"trace": "nowhere"}, "path"),
        ({"load_fraction": 0.0}, "rate_rps"),
        ({"length_scale": -1.0}, "factor"),
    ],
)
def test_impossible_episodes_are_refused(fleet, changes, field):
    asked = {"trace": "azure2023_conv", "requests": 10, "load_fraction": 1.0, "length_scale": 0.1} | changes
    with pytest.raises(InputError) as caught:
        make_episode(fleet, asked.pop("trace"), SCENARIO, **asked)
    assert caught.value.field == field
