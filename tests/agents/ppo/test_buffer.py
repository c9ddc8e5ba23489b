import gymnasium
import numpy as np
import pytest
import torch

from servegym.agents.ppo.buffer import ReturnNormalizer, RolloutBuffer, gae, group_relative


def mean_discount(rate):
    """Mean of exp(-s) for s from 0 to `rate`: what a reward that accrues evenly is worth at its start."""
    return (1 - np.exp(-rate)) / rate


def test_gae_by_hand():
    """Three decisions, 1 s, 2 s and 1 s apart, at a discount and a lambda of one half a second.

    delta_2 = 4 + 1/2 * 8 - 2 = 6            A_2 = 6
    delta_1 = 2 + 1/4 * 2 - 1 = 1.5          A_1 = 1.5 + 1/4 * 1/4 * 6 = 1.875
    delta_0 = 1 + 1/2 * 1 - 3 = -1.5         A_0 = -1.5 + 1/2 * 1/2 * 1.875 = -1.03125
    """
    elapsed = np.array([1.0, 2.0, 1.0])[:, None]
    half = np.log(2)
    rewards, values, after = (np.array(x, float)[:, None] for x in ([1, 2, 4], [3, 1, 2], [1, 2, 8]))
    rewards /= mean_discount(half * elapsed)
    advantages = gae(rewards, values, after, elapsed, np.zeros((3, 1), bool), half, 1 / half)
    np.testing.assert_allclose(advantages[:, 0], [-1.03125, 1.875, 6.0])


@pytest.mark.parametrize(("final_value", "first"), [(0.0, -2.0), (6.0, 1.0)])
def test_gae_stops_at_the_end_of_an_episode(final_value, first):
    """Termination (nothing follows) and truncation (the final observation's value) differ by that only."""
    rewards, values = np.array([[1.0], [5.0]]) / mean_discount(np.log(2)), np.array([[3.0], [1.0]])
    after, ends = np.array([[final_value], [0.0]]), np.array([[True], [True]])
    advantages = gae(rewards, values, after, np.full((2, 1), np.log(2)), ends, 1.0, 3.0)
    np.testing.assert_allclose(advantages[:, 0], [first, 4.0])


def test_gae_with_lambda_one_is_the_discounted_return():
    rng = np.random.default_rng(0)
    rewards, values, last = rng.normal(size=(20, 3)), rng.normal(size=(20, 3)), rng.normal(size=3)
    elapsed = rng.exponential(1.0, (20, 3))
    after = np.concatenate([values[1:], last[None]])
    advantages = gae(rewards, values, after, elapsed, np.zeros((20, 3), bool), 0.1, np.inf)
    since = np.concatenate([np.zeros((1, 3)), elapsed.cumsum(0)])
    accrued = mean_discount(0.1 * elapsed) * rewards
    returns = (np.exp(-0.1 * since[:-1]) * accrued).sum(0) + np.exp(-0.1 * since[-1]) * last
    np.testing.assert_allclose(values[0] + advantages[0], returns)


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


def test_minibatches_are_the_stored_decisions(least_inflight):
    env = least_inflight(4, 3)
    buffer = RolloutBuffer(5, 4, env.single_observation_space)
    obs, _ = env.reset(seed=3)
    for step in range(5):
        buffer.put(step, obs)
        buffer.actions[step] = 10 * step + np.arange(4)
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


def test_memory_is_what_the_arrays_take(least_inflight):
    space = least_inflight(1, 16).single_observation_space
    bytes_per_decision = sum(box.dtype.itemsize * int(np.prod(box.shape)) for box in space.values())
    buffer = RolloutBuffer(8, 4, space)
    assert isinstance(space, gymnasium.spaces.Dict)
    assert buffer.nbytes == 32 * (bytes_per_decision + 8 + 4 + 4 * 8 + 1 + 2 * 4)


def test_group_relative_takes_out_what_a_group_shares():
    advantages = np.array([[1.0, 3.0, 10.0, 20.0], [0.0, 4.0, -1.0, 1.0]])
    expected = [[-1.0, 1.0, -5.0, 5.0], [-2.0, 2.0, -1.0, 1.0]]
    np.testing.assert_array_equal(group_relative(advantages, 2), expected)
    shared = np.repeat(np.array([[5.0, -3.0], [2.0, 8.0]]), 2, axis=1)  # arrivals move whole groups
    np.testing.assert_array_equal(group_relative(advantages + shared, 2), expected)
    np.testing.assert_array_equal(group_relative(advantages, 1), advantages)
