"""PPO's gradient inside a kernel is torch's."""

import numpy as np
import pytest
import torch

from servegym.agents.ppo import imitation
from servegym.agents.ppo.config import PPOConfig
from servegym.agents.ppo.gradient import STATISTICS
from servegym.agents.ppo.ppo import PPO


@pytest.fixture
def model(make_env):
    """Behind a roll-out and with other weights than it was played with, so that ratios differ from 1."""
    model = PPO(make_env(8), config=PPOConfig(n_steps=16, batch_size=128, num_threads=2), seed=2).learn(128)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def assert_close(model, got, want):
    largest = max(slope.abs().max().item() for slope in want)
    for (name, _), a, b in zip(model.network.named_parameters(), got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * largest, err_msg=name)


def test_gradient_and_statistics_are_torchs(model):
    numbers = torch.randperm(model.buffer.advantages.size)[:100]
    want, want_statistics = model._gradient(numbers, 0.3)
    model.kernel.load(model.network.state_dict())
    for _ in range(2):  # the second finds the memory that the first left
        got, statistics = model._kernel_gradient(numbers, 0.3)
        assert_close(model, got, want)
        np.testing.assert_allclose(statistics, want_statistics, rtol=1e-3, atol=1e-5)
    assert statistics[STATISTICS.index("clipfrac")] > 0, "some ratios are clipped"


def test_imitation_is_torchs(model):
    numbers = torch.randperm(model.buffer.advantages.size)[:100]
    want, (_, value_loss) = imitation._gradient(model, numbers, 0.3)
    model.kernel.load(model.network.state_dict())
    got, statistics = model._kernel_gradient(numbers, 0.3, imitate=True)
    assert_close(model, got, want)
    np.testing.assert_allclose(statistics[STATISTICS.index("value_loss")], value_loss, rtol=1e-4)
