"""A network learns to answer like its teacher, and goes on from there."""

import numpy as np
import pytest
import torch

from servegym.agents.heuristics import make_heuristic
from servegym.agents.ppo import PPO, PPOConfig, imitate
from servegym.errors import InputError
from servegym.models.config import NetworkConfig

CONFIG = PPOConfig(n_steps=32, batch_size=128, learning_rate=5e-3, num_threads=1)


def trainer(env, seed=0):
    return PPO(env, NetworkConfig(16, 1), CONFIG, seed=seed)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.network.parameters()])


def test_learns_the_teachers_answers(make_env):
    model = trainer(make_env(16))
    agreements = imitate(model, make_heuristic("least_tokens"), 30)
    assert len(agreements) == 30
    assert agreements[0] < 0.7
    assert np.mean(agreements[-3:]) > 0.85


def test_the_value_head_learns_the_returns(make_env):
    model = trainer(make_env(16))
    imitate(model, make_heuristic("least_tokens"), 30)
    with torch.no_grad():
        _, values = model.network(model.buffer.rows(torch.arange(model.buffer.targets.size))[0])
    assert np.corrcoef(values.numpy(), model.buffer.targets.ravel())[0, 1] > 0.5


def test_training_goes_on_and_repeats(make_env):
    runs = []
    for _ in range(2):
        model = trainer(make_env(8))
        imitate(model, make_heuristic("least_request"), 2)
        before = weights(model)
        model.learn(8 * 32 * 2)
        assert model.num_timesteps == 8 * 32 * 2
        assert (model.tally.decisions == 64).all()
        assert not torch.equal(weights(model), before)
        runs.append(weights(model))
    assert torch.equal(*runs)


def test_only_before_ppo(make_env):
    model = trainer(make_env(8)).learn(8 * 32)
    with pytest.raises(InputError, match="before PPO"):
        imitate(model, make_heuristic("least_request"), 1)


def test_a_teacher_sees_what_the_environment_shows(make_env):
    with pytest.raises(InputError, match="oracle"):
        imitate(trainer(make_env(8)), make_heuristic("least_work_oracle"), 1)
    agreements = imitate(trainer(make_env(8, oracle=True)), make_heuristic("least_work_oracle"), 1)
    assert 0 <= agreements[0] <= 1
