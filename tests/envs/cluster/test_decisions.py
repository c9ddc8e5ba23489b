"""Environments of every kind of decision: who is asked what, and why an answer is refused."""

import inspect
import re
import warnings
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from servegym.agents.heuristics import make_heuristic
from servegym.agents.play import play
from servegym.envs.cluster import vector
from servegym.envs.cluster.checker import check_vector_env
from servegym.envs.cluster.decisions import DECISIONS, ENVIRONMENTS, allowed_decisions, kinds_of
from servegym.envs.cluster.env import ClusterEnv, PreemptEnv
from servegym.envs.cluster.episode import fleets_of, make_episodes, mix_episodes
from servegym.envs.cluster.schema import KINDS, OFFERS
from servegym.envs.cluster.simulate import simulate_all
from servegym.envs.cluster.spec import Migration
from servegym.envs.cluster.vector import ClusterVectorEnv
from servegym.envs.scenario import Scenario, load_scenario
from servegym.errors import InputError

SAME, NEXT = AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP
PLAIN = Scenario(clusters=("2xa100-llama-3.1-8b",), requests=12)
FULL = Scenario(
    name="full",
    workload="fixed:512-256",
    clusters=("3xa100-llama-3.1-8b",),
    loads=(1.0, 1.4),
    requests=30,
    migration=Migration(period_s=0.25),
    budget_period_s=0.5,
    drain={"2": 1.5},
    priorities={"0": 0.5, "1": 0.5},
    engine={"kv_blocks": 400, "swap_gib": 0.1},
)


@pytest.fixture(scope="module")
def episodes():
    return make_episodes(FULL, 4, 0)


def equal(a, b):
    """Nested dicts and tuples of arrays are equal to the bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            equal(a[name], b[name])
    elif isinstance(a, tuple):
        for x, y in zip(a, b, strict=True):
            equal(x, y)
    else:
        np.testing.assert_array_equal(a, b)


def answers(mask, rng):
    return np.where(mask == 1, rng.random(mask.shape), -1).argmax(axis=1)


def walk(env, steps, seed=7):
    """Everything that an environment returns along random legal answers."""
    rng = np.random.default_rng(seed)
    obs, _ = env.reset(seed=seed)
    out = [(obs,)]
    for _ in range(steps):
        out.append(env.step(answers(out[-1][0]["mask"], rng)))
    return out


def kinds_seen(transitions):
    return {KINDS[k] for obs, *_ in transitions for k in obs["kind"] if obs["mask"][:, 1:].any()}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_gymnasium_and_our_checker_pass(name, episodes):
    env = gym.make(name, scenario=FULL, episodes=episodes).unwrapped
    step = env.step
    # Gymnasium's checker samples answers without their mask.
    env.step = lambda action: step(action if env.action_masks()[action] else 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env)
    for mode in (SAME, NEXT):
        lanes = gym.make_vec(name, num_envs=3, scenario=FULL, episodes=episodes, autoreset_mode=mode)
        check_vector_env(lanes.unwrapped)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_the_default_scenario_has_the_levers(name):
    entry = gym.spec(name).vector_entry_point.split(":")[1]
    default = inspect.signature(getattr(vector, entry)).parameters["scenario"].default
    allowed = allowed_decisions(fleets_of(load_scenario(default)))
    assert set(ENVIRONMENTS[name] or DECISIONS) <= set(allowed)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_an_agent_is_asked_what_it_takes_and_nothing_else(name, episodes):
    env = gym.make_vec(name, num_envs=4, scenario=FULL, episodes=episodes).unwrapped
    expected = set(kinds_of(ENVIRONMENTS[name] or env.decisions))
    assert kinds_seen(walk(env, 300)) == expected
    assert set(env.rules) == {"dispatch", "preempt", "migrate", "move", "budget"} - expected
    rows = 1 if name == "ServeGym/Dispatch-v0" else OFFERS
    assert env.single_observation_space["requests"].shape[0] == rows


@pytest.mark.parametrize("mode", [SAME, NEXT])
def test_lanes_equal_single_environments(mode, episodes):
    lanes = ClusterVectorEnv(3, FULL, autoreset_mode=mode)
    scalar = SyncVectorEnv([lambda: ClusterEnv(FULL)] * 3, autoreset_mode=mode)
    assert lanes.single_observation_space == scalar.single_observation_space
    rng = np.random.default_rng(0)
    ours, theirs = lanes.reset(seed=11), scalar.reset(seed=11)
    equal(ours, theirs)
    ours, ended = ours[0], 0
    for _ in range(250):
        action = answers(ours["mask"], rng)
        a, b = lanes.step(action), scalar.step(action)
        equal(a[:4], b[:4])
        equal(a[4]["now_s"], b[4]["now_s"])
        ours = a[0]
        ended += (a[2] | a[3]).sum()
    assert ended >= 3


@pytest.mark.parametrize("mode", [SAME, NEXT])
def test_threads_change_nothing(mode, episodes):
    one, three = (
        ClusterVectorEnv(5, FULL, episodes=episodes, num_threads=n, autoreset_mode=mode) for n in (1, 3)
    )
    equal(tuple(walk(one, 150)), tuple(walk(three, 150)))
    equal(one.save_state(), three.save_state())
    three.close()


def test_saved_state_goes_on_to_the_bit(episodes):
    env, other = (ClusterVectorEnv(3, FULL, episodes=episodes) for _ in range(2))
    obs = walk(env, 90)[-1][0]
    equal(other.load_state(env.save_state()), obs)
    rng = np.random.default_rng(1)
    for _ in range(90):
        action = answers(obs["mask"], rng)
        a, b = env.step(action), other.step(action)
        equal(a[:4], b[:4])
        obs = a[0]


def test_the_defaults_of_every_kind_are_the_stock_system(episodes):
    """Whether nobody is asked or everything is answered by 0, the records are the same."""
    stock = simulate_all(episodes, "least_request")
    for decisions in (("dispatch",), ("preempt", "migrate"), None):
        env = ClusterVectorEnv(4, FULL, decisions=decisions, episodes=episodes)
        env.reset(seed=0)
        ended = np.zeros(4, bool)
        while not ended.all():
            _, _, terminated, _, _ = env.step(np.zeros(4, np.int64))
            for lane in np.flatnonzero(terminated & ~ended):
                equal(vars(env.records(lane)), vars(stock[lane]))
            ended |= terminated


def test_a_rule_inside_the_model_equals_the_policy_that_plays_it(episodes):
    outside = play(make_heuristic("migrate_llumnix"), FULL, episodes)
    env = ClusterVectorEnv(
        4, FULL, decisions=["dispatch"], rules={"migrate": "llumnix"}, episodes=episodes, copy=False
    )
    env.reset(seed=0)
    inside = [None] * 4
    while any(r is None for r in inside):
        _, _, terminated, _, _ = env.step(np.zeros(4, np.int64))
        for lane in np.flatnonzero(terminated):
            inside[lane] = inside[lane] or env.records(lane)
    assert env.single_observation_space["requests"].shape[0] == OFFERS
    assert sum(r.migrations.sum() for r in outside) > 0
    for a, b in zip(outside, inside, strict=True):
        equal(vars(a), vars(b))


@pytest.mark.parametrize("mode", [SAME, NEXT])
def test_an_episode_that_asks_nothing_ends_with_its_first_step(mode):
    quiet = make_episodes(PLAIN, 2, 0)
    env = ClusterVectorEnv(2, PLAIN, decisions=["preempt"], episodes=quiet, autoreset_mode=mode)
    obs, _ = env.reset(seed=0)
    assert (obs["mask"].sum(axis=1) == 1).all()
    with pytest.raises(InputError, match="nothing is left to decide"):
        env.step(np.ones(2, int))
    _, reward, terminated, truncated, _ = env.step(np.zeros(2, int))
    assert terminated.all() and not truncated.any()
    for lane in range(2):
        assert reward[lane] == pytest.approx(-env.records(lane).e2e_s.sum())


def test_rewards_of_every_kind_sum_to_end_to_end_times(episodes):
    env = PreemptEnv(FULL, episodes=episodes)
    env.reset(seed=0)
    total, done = 0.0, False
    while not done:
        _, reward, done, _, _ = env.step(0)
        total += reward
    assert total == pytest.approx(-env.records().e2e_s.sum())


def test_time_of_a_question_goes_on_by_what_elapsed(episodes):
    env = ClusterEnv(FULL, episodes=episodes)
    _, info = env.reset(seed=0)
    before, done = info["now_s"], False
    while not done:
        _, _, done, _, info = env.step(0)
        assert info["now_s"] == pytest.approx(before + info["elapsed_s"])
        before = info["now_s"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decisions": ["migrate"]}, "scenario custom: decisions = 'migrate': there is no migration table"),
        ({"decisions": ["dispatch", "budget"]}, "decisions = 'budget': its budget_period_s is 0"),
        ({"decisions": ["steer"]}, "decisions = 'steer': choose from dispatch, preempt, migrate, budget"),
        ({"decisions": []}, "give some of dispatch"),
        ({"decisions": "dispatch"}, "give some of dispatch"),
        ({"rules": {"dispatch": "llumnix"}}, "the agent answers these"),
        ({"rules": {"steer": "left"}}, "kinds are dispatch"),
        ({"decisions": ["preempt"], "rules": {"dispatch": "luck"}}, "rules.dispatch = 'luck': choose one of"),
        ({"decisions": ["preempt"], "rules": {"move": "shortest"}}, "there is no migration table"),
        ({"scenario": []}, "give at least one"),
        ({"scenario": [PLAIN, replace(PLAIN, reward="goodput")]}, "scenarios that are mixed must agree"),
        ({"scenario": [PLAIN, replace(PLAIN, beta=0.2)]}, "beta = 0.2: scenario custom has 0.1"),
    ],
)
def test_what_the_levers_do_not_allow_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        ClusterVectorEnv(**{"scenario": PLAIN, **arguments})


def test_one_world_mixes_scenarios():
    code = replace(PLAIN, name="code", workload="azure2023_code", scrape_s=0.0)
    drawn = mix_episodes([PLAIN, code, FULL], 7, 0)
    assert [e.scenario.name for e in drawn] == ["custom", "code", "full"] * 2 + ["custom"]
    for scenario in (PLAIN, code):
        own = [e for e in drawn if e.scenario == scenario]
        for a, b in zip(own, make_episodes(scenario, 3, 0), strict=False):
            np.testing.assert_array_equal(a.workload.arrived_at_s, b.workload.arrived_at_s)
    env = ClusterVectorEnv(7, [PLAIN, code, FULL], episodes=drawn)
    assert env.decisions == ("dispatch", "preempt", "migrate", "budget")
    assert env.num_instances == 3
    check_vector_env(env)
    alone = ClusterVectorEnv(1, FULL, episodes=[drawn[2]])
    mixed, single = env.reset(seed=0)[0], alone.reset(seed=2)[0]
    equal({name: rows[2] for name, rows in mixed.items()}, {name: rows[0] for name, rows in single.items()})


WHY = {
    "dispatch": ["the cluster has 3 instances", "instance 2 is draining"],
    "preempt": ["requests are offered", "no host memory is free on instance"],
    "migrate": [
        r"a request cannot move to its own instance \(\d\)",
        "instance 2 is draining",
        "instance . is already part of a migration",
    ],
    "move": ["requests of instance . are offered"],
    "budget": [r"a budget has answers 0\.\.5"],
}


def test_every_refusal_has_its_reason_and_changes_nothing(episodes):
    env = ClusterVectorEnv(1, FULL, episodes=episodes)
    env._world.setting["net_call"] = 300_000_000_000  # ps: copies that last until the next tick
    rng = np.random.default_rng(3)
    obs, _ = env.reset(seed=3)
    told = {kind: set() for kind in WHY}
    for _ in range(500):
        for action in np.flatnonzero(obs["mask"][0] == 0):
            before = env.save_state()
            with pytest.raises(InputError, match=f"action = {action}: ") as error:
                env.step(np.array([action]))
            told[KINDS[obs["kind"][0]]].add(error.value.hint)
            equal(before, env.save_state())
        obs, *_ = env.step(answers(obs["mask"], rng))
    for kind, patterns in WHY.items():
        for pattern in patterns:
            assert any(re.search(pattern, hint) for hint in told[kind]), (kind, pattern, sorted(told[kind]))


def test_swap_without_host_memory_says_so(episodes):
    bare = replace(FULL, engine={"kv_blocks": 400})
    env = PreemptEnv(bare, episodes=make_episodes(bare, 2, 0))
    env.reset(seed=0)
    with pytest.raises(InputError, match=r"instance \d has no host memory to swap to \(swap_gib is 0\)"):
        env.step(2)
