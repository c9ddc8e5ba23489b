"""PPO and MaskablePPO on the real environment."""

import numpy as np
import pytest

from servegym.agents.ppo import PPO, CheckpointCallback, PPOConfig, load_policy
from servegym.envs.cluster.episode import make_episodes
from servegym.envs.cluster.sb3 import ServeGymVecEnv
from servegym.envs.cluster.vector import DispatchVectorEnv
from servegym.envs.scenario import Scenario
from servegym.models.config import NetworkConfig

SCENARIO = Scenario(clusters=("2xa100-llama-3.1-8b+1xh100-llama-3.1-8b",), requests=24, noise=0.1)
LANES, STEPS = 8, 16


@pytest.fixture(scope="module")
def episodes():
    return make_episodes(SCENARIO, 4, 0)


def make(episodes):
    return DispatchVectorEnv(LANES, SCENARIO, episodes=episodes, copy=False, max_episode_steps=21)


def state(model):
    arrays = {name: p.numpy() for name, p in model.network.state_dict().items()}
    return (
        arrays | model.vector_env.save_state() | {f"now.{k}": v.copy() for k, v in model.observation.items()}
    )


def test_a_resumed_run_equals_an_uninterrupted_one(episodes, tmp_path):
    config, total = PPOConfig(n_steps=STEPS, batch_size=64, beta=SCENARIO.beta), LANES * STEPS * 5
    whole = PPO(make(episodes), NetworkConfig(8, 1), config, seed=7).learn(total)

    class Crash(CheckpointCallback):
        def _save(self):
            super()._save()
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run = PPO(make(episodes), NetworkConfig(8, 1), config, seed=7)
        run.learn(total, Crash(tmp_path / "c", LANES * STEPS * 2))
    resumed = PPO.resume(tmp_path / "c", make(episodes)).learn(total)
    expected = state(whole)
    for name, array in state(resumed).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    obs = {name: rows.copy() for name, rows in whole.observation.items()}
    whole.save(tmp_path / "end")
    np.testing.assert_array_equal(load_policy(tmp_path / "end").act(obs), whole.predict(obs)[0])


def test_maskable_ppo_runs_on_the_same_environment(episodes):
    sb3_contrib = pytest.importorskip("sb3_contrib", reason="needs the extra `contrib`")
    from servegym.models.sb3 import GraphMaskablePolicy

    env = ServeGymVecEnv(DispatchVectorEnv(LANES, SCENARIO, episodes=episodes))
    model = sb3_contrib.MaskablePPO(GraphMaskablePolicy, env, n_steps=STEPS, batch_size=64, seed=0)
    before = [p.detach().clone() for p in model.policy.parameters()]
    model.learn(LANES * STEPS * 2)
    assert model.num_timesteps == LANES * STEPS * 2
    assert any((p != q).any() for p, q in zip(model.policy.parameters(), before, strict=True))
