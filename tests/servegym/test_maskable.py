"""MaskablePPO on semi-Markov time: its discount and the scale of its rewards."""

import math

import numpy as np
import pytest

from servegym.agents.ppo import PPOConfig
from servegym.envs.cluster.episode import make_episodes
from servegym.envs.cluster.vector import DispatchVectorEnv
from servegym.envs.scenario import Scenario
from servegym.models.config import NetworkConfig

pytest.importorskip("sb3_contrib")

from servegym.maskable import MaskableTrainer

# Four times what the fleet can serve: requests queue, and rewards grow far beyond 1.
SCENARIO = Scenario(
    clusters=("1xl40s-llama-3.1-8b",), workload="fixed:4096-512", requests=400, loads=(4.0, 4.0)
)


def trainer(folder, beta: float, seed: int = 0) -> MaskableTrainer:
    env = DispatchVectorEnv(4, SCENARIO, episodes=make_episodes(SCENARIO, 4, 0), copy=True)
    config = PPOConfig(n_steps=64, batch_size=64, n_epochs=1, beta=beta)
    return MaskableTrainer(env, NetworkConfig(8, 1), config, seed, str(folder), None, {}, "train", "cpu")


def test_discount_is_that_of_the_mean_time_between_decisions(tmp_path):
    rates = [episode.workload.rate_rps for episode in make_episodes(SCENARIO, 4, 0)]
    expected = math.exp(-0.5 / np.mean(rates))
    model = trainer(tmp_path, beta=0.5)
    assert math.log(model.gamma) == pytest.approx(math.log(expected), rel=0.3)
    assert trainer(tmp_path, beta=1.0).gamma == pytest.approx(model.gamma**2)
    assert model.env.gamma == model.gamma


def test_rewards_are_scaled_and_observations_are_not(tmp_path):
    model = trainer(tmp_path, beta=0.1)
    model.learn(256)
    assert np.abs(model.env.get_original_reward()).max() > 20
    assert np.abs(model.rollout_buffer.rewards).max() <= 10
    seen, raw = model.rollout_buffer.observations, model.env.get_original_obs()
    assert np.array_equal(model.observation["instances"], raw["instances"])
    assert seen["instances"].max() > 10  # tokens and counts as they are
