"""sb3-contrib's MaskablePPO with the graph network."""

import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from servegym.models.config import NetworkConfig
from servegym.models.features import ILLEGAL

sb3_contrib = pytest.importorskip("sb3_contrib", reason="needs the extra `contrib`")


class OneStep(gymnasium.Env):
    """Reward 1 for the instance with the fewest requests in flight, then the episode ends."""

    def __init__(self, draw):
        self.draw, self.clock = draw, 0
        parts = {}
        for name, rows in self._question().items():
            box = gymnasium.spaces.Box(-np.inf, np.inf, rows.shape, rows.dtype)
            parts[name] = gymnasium.spaces.Discrete(4) if name == "kind" else box
        self.observation_space = gymnasium.spaces.Dict(parts)
        self.action_space = gymnasium.spaces.Discrete(5)

    def _question(self):
        self.clock += 1
        obs = {name: rows[0] for name, rows in self.draw(self.clock, lanes=1, real=3, instances=4).items()}
        obs["mask"] = np.array([1, 1, 1, 1, 0], np.int8)
        return obs

    def action_masks(self):
        return self.obs["mask"].astype(bool)

    def reset(self, *, seed=None, options=None):
        self.clock = self.clock if seed is None else seed << 20
        self.obs = self._question()
        return self.obs, {}

    def step(self, action):
        assert self.obs["mask"][action]
        load = self.obs["instances"][:3, 5]
        reward = float(load[self.obs["candidates"][action, 1]] == load.min())
        return self.obs, reward, True, False, {}


def test_maskable_ppo_learns_with_the_graph_network(observation):
    from servegym.models.sb3 import GraphMaskablePolicy

    model = sb3_contrib.MaskablePPO(
        GraphMaskablePolicy,
        DummyVecEnv([lambda: Monitor(OneStep(observation))] * 32),
        n_steps=16,
        batch_size=128,
        n_epochs=8,
        learning_rate=3e-3,
        gamma=0.0,
        seed=0,
        policy_kwargs={"network": NetworkConfig(16, 1)},
    )
    assert model.policy.features_extractor.network.config == NetworkConfig(16, 1)
    model.learn(512 * 8)
    assert np.mean([episode["r"] for episode in model.ep_info_buffer]) > 0.6  # uniform play gets 1/3


def test_distribution_and_value_are_the_networks(observation):
    from servegym.models.sb3 import GraphMaskablePolicy

    env = OneStep(observation)
    policy = GraphMaskablePolicy(env.observation_space, env.action_space, lambda _: 1e-3)
    obs = {
        name: torch.from_numpy(rows) for name, rows in observation(1, lanes=6, real=3, instances=4).items()
    }
    with torch.no_grad():
        logits, values = policy.features_extractor.network(obs)
        distribution = policy.get_distribution(obs, action_masks=obs["mask"].bool())
        torch.testing.assert_close(policy.predict_values(obs)[:, 0], values)
    torch.testing.assert_close(distribution.distribution.probs, torch.softmax(logits, -1))
    assert (logits[obs["mask"] == 0] == ILLEGAL).all()
