"""The adapter keeps SB3's contract, and MaskablePPO trains on it."""

import numpy as np
import pytest
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported

from servegym.envs.cluster.episode import make_episodes
from servegym.envs.cluster.sb3 import ServeGymVecEnv
from servegym.envs.cluster.vector import DispatchVectorEnv
from servegym.envs.scenario import Scenario
from servegym.errors import InputError

MIXED = Scenario(clusters=("1xa100-llama-3.1-8b", "3xa100-llama-3.1-8b"), requests=8)


@pytest.fixture(scope="module")
def episodes():
    return make_episodes(MIXED, 4, 0)


def make(episodes, **arguments):
    return ServeGymVecEnv(DispatchVectorEnv(4, MIXED, episodes=episodes, **arguments))


def test_step_contract(episodes):
    env, twin = make(episodes), DispatchVectorEnv(4, MIXED, episodes=episodes)
    assert env.seed(5) == [5, 6, 7, 8]
    obs = env.reset()
    expected, _ = twin.reset(seed=5)
    for _ in range(20):
        for name in expected:
            np.testing.assert_array_equal(obs[name], expected[name])
        np.testing.assert_array_equal(get_action_masks(env), obs["mask"] == 1)
        action = np.zeros(4, np.int64)
        obs, reward, done, infos = env.step(action)
        expected, r, terminated, truncated, info = twin.step(action)
        assert reward.dtype == np.float32
        np.testing.assert_array_equal(reward, r.astype(np.float32))
        np.testing.assert_array_equal(done, terminated | truncated)
        assert [i["elapsed_s"] for i in infos] == info["elapsed_s"].tolist()
        for lane in range(4):
            assert ("terminal_observation" in infos[lane]) == done[lane]
            if done[lane]:
                final = infos[lane]["terminal_observation"]
                assert env.observation_space.contains(final)
                assert final["mask"].tolist() == [1, 0, 0, 0]
                assert infos[lane]["TimeLimit.truncated"] is False


def test_truncation_is_marked(episodes):
    env = make(episodes, max_episode_steps=3)
    env.reset()
    for _ in range(3):
        _, _, done, infos = env.step(np.zeros(4, np.int64))
    assert done.all() and all(info["TimeLimit.truncated"] for info in infos)
    assert all(info["terminal_observation"]["requests"][0, 0] > 0 for info in infos)


def test_attributes_and_methods(episodes):
    env = make(episodes)
    env.reset()
    assert is_masking_supported(env)
    assert env.get_attr("beta") == [MIXED.beta] * 4
    assert len(env.env_method("action_masks", indices=[1, 2])) == 2
    assert env.env_is_wrapped(object) == [False] * 4
    assert not env.has_attr("nothing")
    with pytest.raises(InputError, match="lanes share"):
        env.set_attr("beta", 1.0)
    with pytest.raises(AttributeError, match="only action_masks"):
        env.env_method("render")


def test_next_step_is_refused(episodes):
    with pytest.raises(InputError, match="SB3 needs SameStep"):
        make(episodes, autoreset_mode="NextStep")


def test_maskable_ppo_trains(episodes):
    """Rows of small fleets have illegal answers; the environment would refuse them."""
    env = make(episodes)
    model = MaskablePPO(
        "MultiInputPolicy", env, n_steps=16, batch_size=32, n_epochs=1, seed=0, device="cpu",
        policy_kwargs={"net_arch": [8]},
    )  # fmt: skip
    model.learn(64)
    obs = env.reset()
    action, _ = model.predict(obs, action_masks=get_action_masks(env))
    assert (obs["mask"][np.arange(4), action] == 1).all()
