"""The vector environment: equal to scalar ones, to itself on more threads, and to itself after a reload."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import DictInfoToList, RecordEpisodeStatistics
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from servegym.envs.cluster.checker import check_vector_env
from servegym.envs.cluster.env import DispatchEnv
from servegym.envs.cluster.episode import Episode, make_episodes
from servegym.envs.cluster.spec import ClusterSpec
from servegym.envs.cluster.vector import DispatchVectorEnv
from servegym.envs.scenario import Scenario, Slo
from servegym.envs.workloads.workload import make_workload
from servegym.errors import InputError

SAME, NEXT = AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP
MIXED = Scenario(
    clusters=("2xa100-llama-3.1-8b", "1xa100-llama-3.1-8b+2xl40s-llama-3.1-8b"),
    loads=(0.5, 1.5),
    requests=12,
    noise=0.1,
)


@pytest.fixture(scope="module")
def episodes():
    return make_episodes(MIXED, 5, 0)


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


@pytest.mark.parametrize("mode", [SAME, NEXT])
def test_equals_scalar_environments_across_autoresets(mode):
    vector = DispatchVectorEnv(3, MIXED, autoreset_mode=mode)
    scalar = SyncVectorEnv([lambda: DispatchEnv(MIXED)] * 3, autoreset_mode=mode)
    assert vector.single_observation_space == scalar.single_observation_space
    rng = np.random.default_rng(0)
    ours, _ = vector.reset(seed=11)
    theirs, _ = scalar.reset(seed=11)
    equal(ours, theirs)
    ended = 0
    for _ in range(40):
        action = answers(ours["mask"], rng)
        a, b = vector.step(action), scalar.step(action)
        for mine, other in zip(a[:4], b[:4], strict=True):
            equal(mine, other)
        equal(a[4]["now_s"], b[4]["now_s"])
        ours = a[0]
        done = a[2] | a[3]
        ended += done.sum()
        if mode == SAME and done.any():
            np.testing.assert_array_equal(a[4]["_final_obs"], b[4]["_final_obs"])
            for lane in np.flatnonzero(done):
                mine, other = (step[4]["final_obs"] for step in (a, b))
                equal({n: mine[n][lane] for n in ours}, dict(other[lane]))
    assert ended >= 6, "the walk crossed an autoreset on every lane"


@pytest.mark.parametrize("mode", [SAME, NEXT])
def test_threads_change_nothing(mode, episodes):
    one, two, three = (
        DispatchVectorEnv(7, MIXED, episodes=episodes, num_threads=n, autoreset_mode=mode) for n in (1, 2, 3)
    )
    with_one = walk(one, 40)
    for other in (two, three):
        for a, b in zip(with_one, walk(other, 40), strict=True):
            equal(a, b)
        equal(one.save_state(), other.save_state())
        other.close()


@pytest.mark.parametrize("mode", [SAME, NEXT])
@pytest.mark.parametrize("limit", [None, 5])
def test_checker_passes(mode, limit, episodes):
    check_vector_env(
        DispatchVectorEnv(4, MIXED, episodes=episodes, autoreset_mode=mode, max_episode_steps=limit)
    )


def test_truncation_is_not_termination(episodes):
    env = DispatchVectorEnv(2, MIXED, episodes=episodes, max_episode_steps=5)
    steps = walk(env, 5)[1:]
    for _, _, terminated, truncated, info in steps[:4]:
        assert not terminated.any() and not truncated.any() and "final_obs" not in info
    obs, _, terminated, truncated, info = steps[4]
    assert truncated.all() and not terminated.any()
    # A truncated episode has a question open, whose value a learner bootstraps; the new one has another.
    assert (info["final_obs"]["requests"][:, 0, 0] > 0).all()
    assert (info["final_obs"]["globals"][:, 4] > 0).all() and (obs["globals"][:, 4] == 0).all()
    assert np.isnan(env.records(0).finished_s).any()


def test_given_episodes_come_in_order(episodes):
    env = DispatchVectorEnv(4, MIXED, episodes=episodes)
    obs, _ = env.reset(seed=3)
    for lane in range(4):
        assert obs["requests"][lane, 0, 0] == episodes[lane].workload.prompt_tokens[0]
        assert obs["instance_mask"][lane].sum() == len(episodes[lane].cluster)


@pytest.mark.parametrize("in_order", [True, False])
def test_a_group_meets_the_same_requests_whatever_it_answers(in_order, episodes):
    env = DispatchVectorEnv(6, MIXED, episodes=episodes if in_order else None, group_size=3)
    transitions = walk(env, 40)
    for obs, *_ in transitions:
        for name in ("requests", "history", "instance_mask"):
            np.testing.assert_array_equal(obs[name][:3], obs[name][[0, 0, 0]])
    assert any((obs["instances"][0] != obs["instances"][1]).any() for obs, *_ in transitions)
    assert any((obs["requests"][0] != obs["requests"][3]).any() for obs, *_ in transitions)
    with pytest.raises(InputError, match="must divide num_envs"):
        DispatchVectorEnv(6, MIXED, group_size=4)


def test_drawn_episodes_depend_on_seed_and_lane():
    env = DispatchVectorEnv(16, MIXED)
    first = [tuple(env.reset(seed=s)[0]["requests"][:, 0, 0]) for s in (0, 0, 1)]
    assert first[0] == first[1]
    assert first[0][1:] == first[2][:-1], "seed + lane names the stream, as in Gymnasium"
    assert len(set(first[0])) > 8
    again = tuple(env.reset()[0]["requests"][:, 0, 0])
    assert again != first[2], "without a seed, lanes go on to their next episode"


@pytest.mark.parametrize("mode", [SAME, NEXT])
def test_saved_state_goes_on_to_the_bit(mode, episodes):
    env = DispatchVectorEnv(3, MIXED, episodes=episodes, autoreset_mode=mode)
    rng = np.random.default_rng(0)
    obs, _ = env.reset(seed=5)
    for _ in range(17):
        obs, *_ = env.step(answers(obs["mask"], rng))
    saved = env.save_state()
    other = DispatchVectorEnv(3, MIXED, episodes=episodes, autoreset_mode=mode)
    equal(other.load_state(saved), obs)
    for _ in range(30):
        action = answers(obs["mask"], rng)
        a, b = env.step(action), other.step(action)
        equal(a[:4], b[:4])
        for name in ("elapsed_s", "now_s"):
            equal(a[4][name], b[4][name])
        obs = a[0]
    for lane in range(3):
        equal(vars(env.records(lane)), vars(other.records(lane)))


def test_load_state_refuses_other_dimensions(episodes):
    env = DispatchVectorEnv(3, MIXED, episodes=episodes)
    env.reset(seed=0)
    with pytest.raises(InputError, match="make the environment as it was made"):
        DispatchVectorEnv(2, MIXED, episodes=episodes).load_state(env.save_state())
    with pytest.raises(InputError, match="load_state"):
        env.load_state({})
    with pytest.raises(InputError, match="call reset first"):
        DispatchVectorEnv(2, MIXED, episodes=episodes).save_state()


def test_buffers_are_shared_only_on_request(episodes):
    env = DispatchVectorEnv(2, MIXED, episodes=episodes, copy=False)
    before, _ = env.reset(seed=0)
    after, *_ = env.step(np.zeros(2, int))
    assert all(before[name] is after[name] for name in before)


def test_latency_rewards_sum_to_end_to_end_times(episodes):
    env = DispatchVectorEnv(5, MIXED, episodes=episodes)
    total = sum(step[1] for step in walk(env, MIXED.requests)[1:])
    for lane in range(5):
        assert total[lane] == pytest.approx(-env.records(lane).e2e_s.sum())


def test_goodput_rewards_count_by_class(toy_episode):
    """r0: TTFT 16 ms, TPOT 11 ms. r1: TTFT 25 ms, TPOT 10.5 ms. r2 has one token: TTFT 12 ms, TPOT 0."""

    def total(slo):
        scenario = Scenario(clusters=("1xtoy",), scrape_s=0.0, slo=slo, reward="goodput")
        env = DispatchVectorEnv(1, scenario, episodes=[toy_episode])
        env.reset(seed=0)
        return [float(env.step(np.array([a]))[1][0]) for a in (1, 2, 2)]

    assert total(Slo(1.0, 0.05, weight=2.0)) == [0, 4, 2]
    assert total(Slo(0.020, 0.05)) == [0, 1, 1]
    assert total(Slo(1.0, 0.0107)) == [0, 1, 1]
    assert total(Slo(0.011, 0.05)) == [0, 0, 0]


def test_elapsed_time_adds_up(episodes):
    env = DispatchVectorEnv(1, MIXED, episodes=episodes)
    env.reset(seed=0)
    elapsed = [float(env.step(np.zeros(1, int))[4]["elapsed_s"][0]) for _ in range(MIXED.requests)]
    records = env.records(0)
    np.testing.assert_allclose(elapsed[:-1], np.diff(records.arrived_s), rtol=1e-9)
    assert sum(elapsed) == pytest.approx(records.finished_s.max() - records.arrived_s[0])


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.array([0, 4]), r"lane 1: action = 4: answers lie in 0..3"),
        (np.array([-1, 0]), r"lane 0: action = -1: answers lie in 0..3"),
        (np.array([3, 0]), r"lane 0: action = 3: the cluster has 2 instances"),
        (np.array([0]), r"actions = .*expected 2 integers"),
        (np.array([0.0, 1.0]), r"actions = .*expected 2 integers"),
    ],
)
def test_illegal_answers_change_nothing(action, message):
    scenario = Scenario(clusters=MIXED.clusters, requests=3)
    two = [e for e in make_episodes(scenario, 20, 0) if len(e.cluster) == 2][:2]
    env = DispatchVectorEnv(2, scenario, episodes=two)
    env.reset(seed=0)
    before = env.save_state()
    with pytest.raises(InputError, match=message):
        env.step(action)
    equal(before, env.save_state())


def test_a_request_too_large_for_an_instance_is_named(toy_instance):
    fleet = ClusterSpec("toy", (toy_instance(1.0, kv_blocks=6), toy_instance(0.5)))
    episode = Episode(make_workload("large", [0.0], [20], [8]), fleet, np.array([8], np.int32))
    env = DispatchVectorEnv(1, Scenario(clusters=("1xtoy",)), episodes=[episode])
    env.reset(seed=0)
    with pytest.raises(InputError, match="does not fit into the KV memory of instance 0"):
        env.step(np.array([1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_envs": 0}, "num_envs = 0"),
        ({"num_threads": 0}, "num_threads = 0"),
        ({"max_episode_steps": 0}, "max_episode_steps = 0"),
        ({"episodes": []}, "give at least one"),
        ({"autoreset_mode": AutoresetMode.DISABLED}, "choose NextStep or SameStep"),
        ({"autoreset_mode": "never"}, "choose NextStep or SameStep"),
        ({"scenario": "nowhere"}, "choose one of"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        DispatchVectorEnv(**{"scenario": MIXED, **arguments})


@pytest.mark.parametrize("seed", [-1, 1.5, [1], [1, -2], "a"])
def test_bad_seeds(seed, episodes):
    env = DispatchVectorEnv(2, MIXED, episodes=episodes)
    with pytest.raises(InputError, match="seed"):
        env.reset(seed=seed)


def test_asked_too_early(episodes):
    env = DispatchVectorEnv(2, MIXED, episodes=episodes)
    with pytest.raises(InputError, match="call reset first"):
        env.step(np.zeros(2, int))
    env.reset(seed=0)
    with pytest.raises(InputError, match="has not finished an episode"):
        env.records(0)


def test_make_vec_and_gymnasium_wrappers(episodes):
    env = gym.make_vec("ServeGym/Dispatch-v0", num_envs=2, scenario=MIXED, max_episode_steps=4)
    assert isinstance(env.unwrapped, DispatchVectorEnv)
    wrapped = DictInfoToList(RecordEpisodeStatistics(env))
    obs, _ = wrapped.reset(seed=0)
    for _ in range(4):
        obs, _, _, truncated, infos = wrapped.step(np.zeros(2, int))
    assert truncated.all()
    assert set(infos[0]["final_obs"]) == set(obs)
    assert infos[1]["episode"]["l"] == 4


def test_padding_is_clean_after_a_larger_fleet(episodes):
    large, small = (next(e for e in episodes if len(e.cluster) == n) for n in (3, 2))
    env = DispatchVectorEnv(1, MIXED, episodes=[large, small], oracle=True, max_episode_steps=9)
    obs, _ = env.reset(seed=0)
    sizes = []
    while len(set(sizes)) < 2 or sizes[-1] == 3:
        sizes.append(int(obs["instance_mask"].sum()))
        for name in ("instances", "instance_mask"):
            assert (obs[name][0, sizes[-1] :] == 0).all()
        for name in ("edges", "mask", "oracle"):
            assert (obs[name][0, sizes[-1] + 1 :] == 0).all()
        obs, *_ = env.step(np.full(1, sizes[-1]))


def test_larger_fleets_than_the_scenario_names(episodes):
    """A policy trained on small fleets plays on large ones: arrays grow with the episodes."""
    env = DispatchVectorEnv(1, Scenario(clusters=("1xa100-llama-3.1-8b",)), episodes=episodes)
    assert env.num_instances == 3


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    fleets=st.lists(
        st.tuples(st.integers(1, 3), st.integers(0, 2)).map(
            lambda n: f"{n[0]}xa100-llama-3.1-8b" + (f"+{n[1]}xl40s-llama-3.1-8b" if n[1] else "")
        ),
        min_size=1,
        max_size=3,
    ),
    workload=st.sampled_from(["azure2023_conv", "servegen_general"]),
    scrape_s=st.sampled_from([0.0, 0.05, 1.0]),
    noise=st.sampled_from([0.0, 0.5]),
    reward=st.sampled_from(["latency", "goodput"]),
    kv_blocks=st.sampled_from([None, 4000]),
    mode=st.sampled_from([SAME, NEXT]),
    seed=st.integers(0, 2**31),
)
def test_random_policy_on_random_scenarios(fleets, workload, scrape_s, noise, reward, kv_blocks, mode, seed):
    scenario = Scenario(
        clusters=tuple(fleets), loads=(0.3, 3.0), requests=15, workload=workload, scrape_s=scrape_s,
        noise=noise, reward=reward, engine={"kv_blocks": kv_blocks},
    )  # fmt: skip
    episodes = make_episodes(scenario, 3, seed)
    env = DispatchVectorEnv(3, scenario, episodes=episodes, autoreset_mode=mode, num_threads=2, oracle=True)
    check_vector_env(env, seed=seed)
    for lane in range(3):
        assert np.isfinite(env.records(lane).finished_s).all()
