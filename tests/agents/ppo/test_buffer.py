import gymnasium
import numpy as np
import pytest
import torch

from servegym.agents.ppo.buffer import ReturnNormalizer, RolloutBuffer


def test_normaliser_follows_the_returns_and_survives_saving():
    rng, normalizer = np.random.default_rng(1), ReturnNormalizer()
    assert (normalizer.mean, normalizer.std) == (0.0, 1.0)
    for _ in range(300):
        normalizer.update(rng.normal(-40.0, 3.0, 1000))
    assert normalizer.mean == pytest.approx(-40, abs=0.2)
    assert normalizer.std == pytest.approx(3, abs=0.2)
    copy = ReturnNormalizer()
    copy.load(normalizer.state())
    assert vars(copy) == vars(normalizer)


def test_minibatches_are_the_stored_decisions(make_env):
    env = make_env(4)
    buffer = RolloutBuffer(5, 4, env.single_observation_space)
    obs, _ = env.reset(seed=3)
    for step in range(5):
        for name, rows in buffer.obs.items():
            rows[step] = obs[name]
        buffer.steps.actions[step] = 10 * step + np.arange(4)
        obs, *_ = env.step(np.zeros(4, np.int64))
    seen = []
    for numbers in buffer.minibatches(8, torch.Generator().manual_seed(0)):
        rows, other = buffer.rows(numbers)
        seen += numbers.tolist()
        for number, action, instances in zip(numbers, other["actions"], rows["instances"], strict=True):
            step, lane = divmod(int(number), 4)
            assert action == 10 * step + lane
            np.testing.assert_array_equal(instances, buffer.obs["instances"][step, lane])
    assert sorted(seen) == list(range(20))
    assert seen != list(range(20))


def test_memory_is_what_the_arrays_take(make_env):
    space = make_env(1).single_observation_space
    bytes_per_decision = sum(box.dtype.itemsize * int(np.prod(box.shape)) for box in space.values())
    buffer = RolloutBuffer(8, 4, space)
    assert isinstance(space, gymnasium.spaces.Dict)
    # lane, actions, plays, lengths; rewards, elapsed, now, returns; log_probs, values, next; ends; targets
    assert buffer.nbytes == 32 * (bytes_per_decision + 4 * 8 + 4 * 8 + 3 * 4 + 2 + 2 * 4)
