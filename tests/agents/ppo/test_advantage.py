import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servegym.agents.ppo.advantage import comparable, gae, group_relative, real_values
from servegym.agents.ppo.rollout import make_steps, make_tally


def steps_of(rewards, elapsed, terminated=None, truncated=None, lane=None):
    steps = make_steps(*rewards.shape)
    none = np.zeros(rewards.shape, bool)
    steps = steps._replace(
        rewards=rewards,
        elapsed_s=elapsed,
        lane=np.arange(rewards.shape[1]) + np.zeros(rewards.shape, int) if lane is None else lane,
    )
    return steps._replace(
        terminated=none if terminated is None else terminated,
        truncated=none if truncated is None else truncated,
    )


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
    steps = steps_of(rewards / mean_discount(half * elapsed), elapsed)
    advantages = gae(steps, values, after, half, 1 / half)
    np.testing.assert_allclose(advantages[:, 0], [-1.03125, 1.875, 6.0])


@pytest.mark.parametrize("how", ["terminated", "truncated"])
@pytest.mark.parametrize(("final_value", "first"), [(0.0, -2.0), (6.0, 1.0)])
def test_gae_stops_at_the_end_of_an_episode(final_value, first, how):
    rewards, values = np.array([[1.0], [5.0]]) / mean_discount(np.log(2)), np.array([[3.0], [1.0]])
    after = np.array([[final_value], [0.0]])
    steps = steps_of(rewards, np.full((2, 1), np.log(2)), **{how: np.array([[True], [True]])})
    np.testing.assert_allclose(gae(steps, values, after, 1.0, 3.0)[:, 0], [first, 4.0])


def test_gae_with_lambda_one_is_the_discounted_return():
    rng = np.random.default_rng(0)
    rewards, values, last = rng.normal(size=(20, 3)), rng.normal(size=(20, 3)), rng.normal(size=3)
    elapsed = rng.exponential(1.0, (20, 3))
    after = np.concatenate([values[1:], last[None]])
    advantages = gae(steps_of(rewards, elapsed), values, after, 0.1, np.inf)
    since = np.concatenate([np.zeros((1, 3)), elapsed.cumsum(0)])
    accrued = mean_discount(0.1 * elapsed) * rewards
    returns = (np.exp(-0.1 * since[:-1]) * accrued).sum(0) + np.exp(-0.1 * since[-1]) * last
    np.testing.assert_allclose(values[0] + advantages[0], returns)


def test_the_next_decision_is_the_lanes_own_wherever_it_stands():
    """The same decisions, lanes as columns and lanes mixed: the same values ahead and advantages."""
    rng = np.random.default_rng(1)
    shape = (12, 4)
    rewards, elapsed, ends = rng.normal(size=shape), rng.exponential(1.0, shape), rng.random(shape) < 0.2
    cut = ends & (rng.random(shape) < 0.5)
    steps = steps_of(rewards, elapsed, ends & ~cut, cut)
    steps.values[:], steps.next_values[:] = rng.normal(size=shape), rng.normal(size=shape)
    tally = make_tally(4)
    tally.last_values[:] = rng.normal(size=4)
    values, following = real_values(steps, tally, 2.0, 3.0)
    np.testing.assert_allclose(values, 2 + 3 * steps.values.astype(float))
    inner = ~ends[:-1]
    np.testing.assert_array_equal(following[:-1][inner], values[1:][inner])
    np.testing.assert_allclose(following[-1][~ends[-1]], (2 + 3 * tally.last_values.astype(float))[~ends[-1]])
    np.testing.assert_allclose(following[cut], 2 + 3 * steps.next_values[cut].astype(float))
    assert (following[ends & ~cut] == 0).all() and cut.any() and (ends & ~cut).any()

    places = np.concatenate([[lane] * 12 for lane in range(4)])
    rng.shuffle(places)  # which lane each place of the mixed roll-out is of
    source = np.empty(48, np.int64)
    for lane in range(4):
        source[places == lane] = np.arange(12) * 4 + lane

    def mixed(array):
        return array.ravel()[source].reshape(shape)

    other = type(steps)(*(mixed(array) for array in steps))
    np.testing.assert_array_equal(other.lane.ravel(), places)
    got_values, got_following = real_values(other, tally, 2.0, 3.0)
    np.testing.assert_array_equal(got_following, mixed(following))
    expected = mixed(gae(steps, values, following, 0.3, 2.0))
    np.testing.assert_array_equal(gae(other, got_values, got_following, 0.3, 2.0), expected)


def asked_together(shape, group):
    steps = make_steps(*shape)
    steps.now_s[:] = np.arange(shape[0])[:, None] // 2  # two questions at each time
    steps.plays[:] = 1
    steps.lane[:] = np.arange(shape[1])
    return steps


def test_group_relative_takes_out_what_a_group_shares():
    advantages = np.array([[1.0, 3.0, 10.0, 20.0], [0.0, 4.0, -1.0, 1.0]])
    expected = [[-1.0, 1.0, -5.0, 5.0], [-2.0, 2.0, -1.0, 1.0]]
    steps = asked_together((2, 4), 2)
    np.testing.assert_array_equal(group_relative(steps, advantages, 2), expected)
    shared = np.repeat(np.array([[5.0, -3.0], [2.0, 8.0]]), 2, axis=1)  # arrivals move whole groups
    np.testing.assert_array_equal(group_relative(steps, advantages + shared, 2), expected)
    np.testing.assert_array_equal(group_relative(steps, advantages, 1), advantages)


def random_group(seed, groups=2, size=3, count=30):
    """Lanes that are asked at times of their own, ties included, over two or three plays."""
    rng = np.random.default_rng(seed)
    steps = make_steps(count, groups * size)
    for g in range(groups):
        lane = g * size + rng.integers(0, size, count * size)
        plays, now = np.sort(rng.integers(1, 4, count * size)), np.zeros(count * size)
        for p in np.unique(plays):
            now[plays == p] = np.sort(rng.integers(0, 20, (plays == p).sum()) / 2)
        for name, row in (("lane", lane), ("plays", plays), ("now_s", now)):
            getattr(steps, name)[:, g * size : g * size + size] = row.reshape(count, size)
    return steps, rng.normal(size=(count, groups * size)), size


def plainly(steps, advantages, size):
    """`group_relative` as its formula says, decision by decision, for times without ties."""
    result = advantages.copy()
    for t, b in np.ndindex(advantages.shape):
        group, read = slice(b // size * size, b // size * size + size), []
        play, s = steps.plays[t, b], steps.now_s[t, b]
        for lane in range(group.start, group.stop):
            mine = (steps.lane[:, group] == lane) & (steps.plays[:, group] == play)
            if mine.any():
                read.append(np.interp(s, steps.now_s[:, group][mine], advantages[:, group][mine]))
        if len(read) > 1:
            result[t, b] -= np.mean(read)
    return result


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_group_relative_is_its_formula(seed):
    steps, advantages, size = random_group(seed)
    steps.now_s[:] += np.linspace(0, 0.4, steps.now_s.size).reshape(steps.now_s.shape)  # no ties
    order = np.lexsort((steps.now_s, steps.plays), axis=0)
    assert order.shape == steps.now_s.shape
    expected = plainly(steps, advantages, size)
    np.testing.assert_allclose(group_relative(steps, advantages, size), expected, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_disturbance_of_the_play_cancels(seed):
    """Ties included: what all lanes of a group meet in a play changes nothing where a lane has company."""
    steps, advantages, size = random_group(seed)
    disturbance = np.random.default_rng(seed).normal(size=(2, 4)) * 100
    group = np.arange(2 * size) // size
    before = group_relative(steps, advantages, size)
    after = group_relative(steps, advantages + disturbance[group[None], steps.plays], size)
    alone = np.zeros(before.shape, bool)
    for t, b in np.ndindex(before.shape):
        mine = slice(group[b] * size, group[b] * size + size)
        alone[t, b] = len(set(steps.lane[:, mine][steps.plays[:, mine] == steps.plays[t, b]])) == 1
    np.testing.assert_allclose(after[~alone], before[~alone], atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_renumbering_lanes_changes_nothing(seed):
    """The lanes of a group are equal: names of lanes do not enter, and groups do not mix."""
    steps, advantages, size = random_group(seed)
    names = np.concatenate([np.random.default_rng(seed + g).permutation(size) + g * size for g in range(2)])
    renamed = steps._replace(lane=names[steps.lane])
    expected = group_relative(steps, advantages, size)
    np.testing.assert_allclose(group_relative(renamed, advantages, size), expected, atol=1e-12)
    changed = advantages.copy()
    changed[:, size:] += 1
    np.testing.assert_array_equal(group_relative(steps, changed, size)[:, :size], expected[:, :size])


def test_groups_count_alike_but_for_those_in_which_nothing_is_at_stake():
    rng = np.random.default_rng(0)
    large, small, flat = rng.normal(0, 100, (50, 4)), rng.normal(0, 20, (50, 4)), np.full((50, 4), 1e-3)
    scaled = comparable(np.concatenate([large, small, flat], axis=1), 4).reshape(50, 3, 4)
    spread = scaled.std((0, 2))
    np.testing.assert_allclose(spread[:2], 1.0, rtol=0.01)
    assert spread[2] < 1e-6
