"""A small vector environment on which PPO runs."""

from dataclasses import replace

import pytest

from servegym.envs.cluster.episode import make_episodes
from servegym.envs.cluster.vector import DispatchVectorEnv
from servegym.envs.scenario import Scenario

SCENARIO = Scenario(clusters=("2xa100-llama-3.1-8b+1xh100-llama-3.1-8b",), requests=24, noise=0.1)
MOST_STEPS = 21  # truncates some episodes and not others


def make_environment(num_envs, scenario=SCENARIO, **options):
    """B lanes of clusters of 3 instances, whose episodes have 24 or 16 requests."""
    short = replace(scenario, requests=16)
    episodes = make_episodes(scenario, 4, 0) + make_episodes(short, 4, 1)
    options = {"max_episode_steps": MOST_STEPS, "copy": False} | options
    return DispatchVectorEnv(num_envs, scenario, episodes=episodes, **options)


@pytest.fixture(scope="session")
def make_env():
    """The function itself: tests ask for the sizes they need."""
    return make_environment
