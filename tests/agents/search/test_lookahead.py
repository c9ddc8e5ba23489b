"""Look-ahead: scores are what really happens, it beats its rules, and the real lanes notice nothing."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servegym.agents.heuristics import make_heuristic
from servegym.agents.play import play
from servegym.agents.search.lookahead import Lookahead
from servegym.envs.cluster.episode import make_episodes
from servegym.envs.cluster.schema import KINDS
from servegym.envs.cluster.spec import Migration
from servegym.envs.cluster.state import OWNED
from servegym.envs.cluster.vector import ClusterVectorEnv
from servegym.envs.scenario import Scenario, Slo
from servegym.errors import InputError

TIGHT = Slo(ttft_s=0.15, tpot_s=0.012)
CHAT = Scenario(
    clusters=("1xa100-llama-3.1-8b+1xl40s-llama-3.1-8b",), loads=(1.5, 3.0), requests=6, slo=TIGHT
)
SESSIONS = Scenario(
    workload="sharegpt_turns", clusters=("2xa100-llama-3.1-8b",), loads=(1.0, 1.0), requests=24, slo=TIGHT
)
SCARCE = Scenario(
    workload="llumnix:256-256", clusters=("3xa10-llama-7b",), loads=(2.0, 2.0), requests=40,
    slo=Slo(ttft_s=1.0, tpot_s=0.04), engine={"kv_blocks": 800},
)  # fmt: skip
ALL_KINDS = Scenario(
    workload="llumnix:128-512", clusters=("3xa100-llama-3.1-8b",), loads=(4.0, 4.0), requests=60,
    slo=Slo(ttft_s=1.0, tpot_s=0.02), engine={"kv_blocks": 480, "swap_gib": 2.0},
    migration=Migration(period_s=1.0), budget_period_s=0.1,
)  # fmt: skip
LEAST_REQUEST = [{"dispatch": "least_request"}]


def make(scenario, seed, lanes=1, **arguments):
    return ClusterVectorEnv(lanes, scenario, episodes=make_episodes(scenario, lanes, seed), **arguments)


def value(records, slo, objective):
    """What `Lookahead` maximises, from records; all classes weigh 1."""
    late = records.ttft_s / slo.ttft_s
    tpot = (records.finished_s - records.first_token_s) / np.maximum(records.output_tokens - 1, 1)
    slow = tpot / slo.tpot_s
    if objective == "latency":
        return -records.e2e_s.sum()
    met = ((late <= 1) & (slow <= 1)).sum()
    if objective == "goodput":
        return met - 0.01 * (late + slow).sum()
    return met - ((late if objective == "ttft" else slow) ** 8).sum()


def outcome(scenario, seed, answers, objective):
    """Value of an episode that begins with these answers and goes on with the default."""
    env = make(scenario, seed)
    env.reset(seed=0)
    answers, terminated = list(answers), [False]
    while not terminated[0]:
        _, _, terminated, _, _ = env.step(np.array([answers.pop(0) if answers else 0]))
    return value(env.records(0), scenario.slo, objective)


def differences(scores):
    return scores - scores.max()


@pytest.mark.parametrize("scenario", [CHAT, SESSIONS, SCARCE, ALL_KINDS])
def test_scores_are_what_the_environment_then_does(scenario):
    env = make(scenario, 1)
    look = Lookahead(behind=LEAST_REQUEST)
    look.watch(env)
    obs, _ = env.reset(seed=0)
    played, terminated, kinds, step = [], [False], set(), -1
    while not terminated[0]:
        step += 1
        answer = look.act(obs)
        legal = np.flatnonzero(obs["mask"][0])
        if step % 8 == 0 or obs["kind"][0] not in kinds:
            kinds.add(obs["kind"][0])
            truth = np.array([outcome(scenario, 1, [*played, k], "goodput") for k in legal])
            np.testing.assert_allclose(differences(look.scores[0, legal]), differences(truth), atol=1e-7)
            assert truth[legal.tolist().index(answer[0])] == pytest.approx(truth.max())
        # A wandering start, so that branches begin in states that neither rule nor search would reach.
        played.append(int(legal[step % len(legal)]))
        obs, _, terminated, _, _ = env.step(np.array([played[-1]]))
    asked = ["dispatch", "preempt", "migrate", "move", "budget"] if scenario is ALL_KINDS else ["dispatch"]
    assert {KINDS[k] for k in kinds} >= set(asked)


def test_the_last_answer_is_that_of_brute_force():
    best_of_all, best_at_last = -np.inf, -np.inf
    for start in product((1, 2), repeat=CHAT.requests - 1):
        env = make(CHAT, 3)
        look = Lookahead("latency", behind=LEAST_REQUEST)
        look.watch(env)
        obs, _ = env.reset(seed=0)
        for k in start:
            obs, *_ = env.step(np.array([k]))
        best_at_last = max(best_at_last, outcome(CHAT, 3, [*start, look.act(obs)[0]], "latency"))
        best_of_all = max(best_of_all, *(outcome(CHAT, 3, [*start, k], "latency") for k in (1, 2)))
    assert best_at_last == best_of_all


@given(
    st.sampled_from([CHAT, SESSIONS, SCARCE, ALL_KINDS]), st.integers(0, 5), st.sampled_from([None, 1]),
    st.sampled_from(["goodput", "latency", "ttft", "tpot"]),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_never_worse_than_its_rules(scenario, seed, width, objective):
    episodes = make_episodes(scenario, 1, seed)
    names = ("least_request", "mooncake")
    look = Lookahead(objective, behind=[{"dispatch": name} for name in names], width=width)
    reached = value(play(look, scenario, episodes, 1)[0], scenario.slo, objective)
    for name in names:
        assert reached >= outcome_of_rule(scenario, episodes, name, objective) - 1e-9 * abs(reached)


def outcome_of_rule(scenario, episodes, name, objective):
    return value(play(make_heuristic(name), scenario, episodes, 1)[0], scenario.slo, objective)


def test_beats_its_rules_where_they_are_blind():
    episodes = make_episodes(CHAT, 4, 5)
    look = play(Lookahead("latency", behind=LEAST_REQUEST), CHAT, episodes)
    gains = [
        value(records, TIGHT, "latency") - outcome_of_rule(CHAT, [episode], "least_request", "latency")
        for records, episode in zip(look, episodes, strict=True)
    ]
    assert max(gains) > 0.01


@pytest.mark.parametrize("scenario", [CHAT, SESSIONS, SCARCE, ALL_KINDS])
def test_leaves_the_lanes_and_the_observation_untouched(scenario):
    env = make(scenario, 2, lanes=2)
    look = Lookahead(horizon_s=0.5, width=1)
    look.watch(env)
    obs, _ = env.reset(seed=0)
    for _ in range(5):
        world, frame = env.lanes()[:2]
        before = [getattr(world, name).copy() for name in OWNED] + [a.copy() for a in frame]
        answer = look.act(obs)
        after = [getattr(world, name) for name in OWNED] + list(frame)
        for a, b in zip(before, after, strict=True):
            np.testing.assert_array_equal(a, b)
        obs, *_ = env.step(answer)


def test_threads_change_nothing():
    episodes = make_episodes(SESSIONS, 3, 0)
    one, three = (play(Lookahead(horizon_s=2, width=1), SESSIONS, episodes, n) for n in (1, 3))
    for a, b in zip(one, three, strict=True):
        np.testing.assert_array_equal(a.finished_s, b.finished_s)
        np.testing.assert_array_equal(a.instance, b.instance)


def test_a_longer_horizon_sees_more():
    env = make(SCARCE, 0)
    seen = []
    for horizon in (0, 1.0, None):
        look = Lookahead(behind=LEAST_REQUEST, horizon_s=horizon)
        look.watch(env)
        obs, _ = env.reset(seed=0)
        look.act(obs)
        seen.append(look.scores[0, 1])
    assert len(set(seen)) == 3


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"objective": "speed"}, "objective"),
        ({"behind": []}, "behind"),
        ({"behind": [{"dispatch": "round_robin"}]}, "behind"),
        ({"behind": [{"dispatch": "agent"}]}, "behind"),
        ({"behind": [{"dispatch": "fastest"}]}, "dispatch"),
        ({"horizon_s": -1}, "horizon_s"),
        ({"horizon_s": float("nan")}, "horizon_s"),
        ({"width": 0}, "width"),
    ],
)
def test_refuses(arguments, field):
    with pytest.raises(InputError, match=field):
        Lookahead(**arguments)


def test_refuses_to_act_for_what_it_does_not_watch():
    obs, _ = make(CHAT, 0).reset(seed=0)
    with pytest.raises(InputError, match="watch"):
        Lookahead().act(obs)
