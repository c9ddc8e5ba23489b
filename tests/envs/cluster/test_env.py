"""The scalar environment against Gymnasium's own checks."""

import warnings
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import servegym.envs
from servegym.envs.cluster import schema
from servegym.envs.cluster.decisions import ENVIRONMENTS
from servegym.envs.cluster.env import BudgetEnv, ClusterEnv, DispatchEnv, MigrateEnv, PreemptEnv
from servegym.envs.cluster.episode import make_episodes
from servegym.envs.cluster.vector import DispatchVectorEnv
from servegym.envs.scenario import Scenario
from servegym.errors import InputError

SMALL = Scenario(clusters=("2xa100-llama-3.1-8b+1xl40s-llama-3.1-8b",), requests=10)


@pytest.fixture(scope="module")
def episodes():
    return make_episodes(SMALL, 3, 0)


def test_episodes_that_share_requests_keep_their_own_predictions(episodes):
    first = episodes[0]
    other = replace(first, predicted_output=first.predicted_output + 1000)
    for episode in (first, other):
        seen = DispatchEnv(SMALL, episodes=[episode]).reset(seed=0)[0]["requests"][0, 1]
        assert seen == episode.predicted_output[0]
    lanes = DispatchVectorEnv(2, SMALL, episodes=[first, other])
    seen = lanes.reset(seed=0)[0]["requests"][:, 0, 1]
    assert sorted(seen) == [first.predicted_output[0], other.predicted_output[0]]


def test_check_env_without_a_warning(episodes):
    env = gym.make("ServeGym/Dispatch-v0", scenario=SMALL, episodes=episodes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)


def test_the_observation_table_is_the_schema():
    sizes = {
        "instances": f"(I, {len(schema.INSTANCE)})",
        "requests": f"(R, {len(schema.REQUEST)})",
        "edges": f"(C, {len(schema.EDGE)})",
        "globals": f"({len(schema.GLOBAL)},)",
        "history": f"({schema.HISTORY},)",
    }
    for name, shape in sizes.items():
        assert f"| `{name}` | {shape} | float32 |" in (ClusterEnv.__doc__ or "")


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_registered_on_import(name):
    assert servegym.envs.__name__ == "servegym.envs"
    spec = gym.spec(name)
    assert spec.entry_point and spec.vector_entry_point


def test_docstring_has_gymnasiums_sections():
    wanted = [
        "Description", "Action Space", "Observation Space", "Rewards", "Starting State", "Episode End",
        "Arguments", "Vectorized environment", "Version History",
    ]  # fmt: skip
    assert headings(ClusterEnv) == wanted
    for special in (DispatchEnv, PreemptEnv, MigrateEnv, BudgetEnv):
        assert headings(special) == ["Description", "Action Space", "Arguments", "Version History"]
        assert "`ClusterEnv`" in special.__doc__
    env = ClusterEnv(SMALL, episodes=make_episodes(SMALL, 1, 0), oracle=True)
    for name, space in env.observation_space.spaces.items():
        row = next(line for line in ClusterEnv.__doc__.splitlines() if line.strip().startswith(f"| `{name}`"))
        assert str(space.dtype) in row


def headings(env):
    return [line.strip()[3:] for line in env.__doc__.splitlines() if line.strip().startswith("## ")]


def test_default_scenario():
    env = gym.make("ServeGym/Dispatch-v0")
    obs, _ = env.reset(seed=0)
    assert env.observation_space.contains(obs)
    assert env.unwrapped.beta == env.unwrapped.scenarios[0].beta > 0


def test_masked_samples_are_legal(episodes):
    env = DispatchEnv(SMALL, episodes=episodes)
    env.action_space.seed(0)
    for episode in range(3):
        obs, _ = env.reset(seed=episode)
        done = False
        while not done:
            assert (env.action_masks() == (obs["mask"] == 1)).all()
            obs, _, done, _, _ = env.step(env.action_space.sample(mask=obs["mask"]))
        assert env.action_masks().tolist() == [True] + [False] * 3


def test_no_step_after_the_end(episodes):
    env = DispatchEnv(SMALL, episodes=episodes)
    with pytest.raises(InputError, match="call reset first"):
        env.step(0)
    env.reset(seed=0)
    for _ in range(SMALL.requests):
        _, _, terminated, truncated, _ = env.step(0)
    assert terminated and not truncated
    with pytest.raises(InputError, match="call reset first"):
        env.step(0)
    env.reset()
    env.step(0)


def test_illegal_answer(episodes):
    env = DispatchEnv(SMALL, episodes=episodes)
    env.reset(seed=0)
    with pytest.raises(InputError, match=r"action = 9: answers lie in 0\.\.3"):
        env.step(9)


def test_default_answer_is_least_request(episodes):
    env = DispatchEnv(SMALL, episodes=episodes)
    obs, _ = env.reset(seed=0)
    for _ in range(SMALL.requests - 1):
        inflight = obs["instances"][:, 5]
        assert obs["candidates"][0, 1] == inflight.argmin()
        obs, *_ = env.step(0)


def test_renders_text(episodes):
    env = DispatchEnv(SMALL, episodes=episodes, render_mode="ansi")
    assert env.render() is None
    obs, _ = env.reset(seed=0)
    text = env.render()
    assert f"{obs['requests'][0, 0]:.0f} prompt tokens" in text and text.count("\ninstance ") == 3
    env.step(2)
    assert "last answer: request 0 to instance 1\n" in env.render()
    assert DispatchEnv(SMALL, episodes=episodes).render() is None


def test_observations_are_the_callers(episodes):
    env = DispatchEnv(SMALL, episodes=episodes)
    obs, _ = env.reset(seed=0)
    before = {name: np.copy(array) for name, array in obs.items()}
    env.step(0)
    assert all((before[name] == obs[name]).all() for name in obs)
