"""A roll-out inside the lanes is what the environment and the network say one step at a time."""

import numpy as np
import pytest
import torch

from servegym.agents.ppo.rollout import Collector, draw, make_steps, make_tally
from servegym.envs.cluster.kernel import decorators
from servegym.envs.cluster.scrape import mix
from servegym.envs.scenario import Scenario
from servegym.models import inlane, simd
from servegym.models.config import NetworkConfig
from servegym.models.dense import DenseNetwork
from servegym.models.features import ARRAYS

CONFIG = NetworkConfig(8, 1)
SESSIONS = Scenario(
    clusters=("2xa100-llama-3.1-8b+1xh100-llama-3.1-8b",),
    requests=24,
    workload="weka_agentic",
    engine={"kv_blocks": 60_000},  # its contexts are long
)
kernel, _ = decorators(simd.__file__, inlane.__file__)


@kernel
def draw_many(logits, legal, seed, chosen, log_probs, odds):
    for k in range(len(chosen)):
        chosen[k], log_probs[k] = draw(logits, legal, len(legal), mix(seed, k), odds)


@pytest.fixture(scope="module")
def network():
    network = DenseNetwork(CONFIG, 3)
    with torch.no_grad():
        network.head_score.weight *= 100  # answers that depend on the question
    return network


def weights(network):
    return {name: parameter.numpy() for name, parameter in network.state_dict().items()}


class Rollout:
    """Some roll-outs of T steps, one behind the other."""

    def __init__(self, env, network, counts, num_threads=1, seed=5):
        env.reset(seed=seed)
        self.env, self.tally = env, make_tally(env.num_envs)
        collector = Collector(env, network.config, num_threads, seed)
        obs, steps = [], []
        for count in counts:
            space = env.single_observation_space
            obs.append({n: np.zeros((count, env.num_envs, *space[n].shape), space[n].dtype) for n in ARRAYS})
            steps.append(make_steps(count, env.num_envs))
            collector.run(weights(network), obs[-1], steps[-1], self.tally)
        collector.close()
        self.obs = {name: np.concatenate([o[name] for o in obs]) for name in ARRAYS}
        self.steps = type(steps[0])(*map(np.concatenate, zip(*steps, strict=True)))

    def arrays(self):
        steps = {name: getattr(self.steps, name) for name in self.steps._fields}
        return {**self.obs, **steps, **self.tally._asdict(), **self.env.save_state()}


def evaluate(network, obs):
    with torch.no_grad():
        logits, values = network({name: torch.from_numpy(obs[name].copy()) for name in ARRAYS})
    return torch.log_softmax(logits, -1).numpy(), values.numpy()


def test_equals_the_environment_stepped_from_outside(make_env, network):
    count = 60
    rollout, twin = Rollout(make_env(6), network, [count]), make_env(6, copy=True)
    steps, lanes = rollout.steps, np.arange(6)
    obs, _ = twin.reset(seed=5)
    returns, lengths, now = np.zeros(6), np.zeros(6, np.int64), twin.lanes().world.lane
    for t in range(count):
        for name in ARRAYS:
            np.testing.assert_array_equal(rollout.obs[name][t], obs[name])
        np.testing.assert_array_equal(steps.lane[t], lanes)
        np.testing.assert_array_equal(steps.now_s[t], now["now"] / 1e12)
        np.testing.assert_array_equal(steps.plays[t], now["plays"])
        log_probs, values = evaluate(network, obs)
        np.testing.assert_allclose(steps.log_probs[t], log_probs[lanes, steps.actions[t]], atol=1e-4)
        np.testing.assert_allclose(steps.values[t], values, atol=1e-4)
        obs, reward, terminated, truncated, info = twin.step(steps.actions[t])
        for name, array in (("rewards", reward), ("terminated", terminated), ("truncated", truncated)):
            np.testing.assert_array_equal(getattr(steps, name)[t], array)
        np.testing.assert_array_equal(steps.elapsed_s[t], info["elapsed_s"])
        final, cut = np.zeros(6), truncated & ~terminated
        if cut.any():
            final[cut] = evaluate(network, {n: info["final_obs"][n][cut] for n in ARRAYS})[1]
        np.testing.assert_allclose(steps.next_values[t], final, atol=1e-4)
        returns, lengths, ends = returns + reward, lengths + 1, terminated | truncated
        np.testing.assert_allclose(steps.returns[t], returns * ends)
        np.testing.assert_array_equal(steps.lengths[t], lengths * ends)
        returns[ends] = lengths[ends] = 0
    assert steps.terminated.any() and (steps.truncated & ~steps.terminated).any()
    np.testing.assert_allclose(rollout.tally.last_values, evaluate(network, obs)[1], atol=1e-4)
    saved = rollout.env.save_state()
    for name, array in twin.save_state().items():
        if name != "finished.req":  # holds bytes between the fields of its records, which nothing reads
            np.testing.assert_array_equal(saved[name], array, err_msg=name)
    for lane in lanes:
        for name, array in vars(twin.records(lane)).items():
            np.testing.assert_array_equal(getattr(rollout.env.records(lane), name), array)


@pytest.mark.parametrize("scenario", [None, SESSIONS])
def test_threads_and_pauses_change_nothing(make_env, network, scenario):
    options = {"group_size": 2} | ({} if scenario is None else {"scenario": scenario})
    whole = Rollout(make_env(6, **options), network, [40]).arrays()
    for counts, num_threads in (([40], 3), ([40], 2), ([13, 27], 1)):
        other = Rollout(make_env(6, **options), network, counts, num_threads).arrays()
        for name, array in whole.items():
            np.testing.assert_array_equal(other[name], array, err_msg=name)


def test_another_seed_draws_other_answers(make_env, network):
    one, two = (Rollout(make_env(4), network, [20], seed=seed).steps.actions for seed in (1, 2))
    assert (one != two).any()
    assert (one[:, 0] != one[:, 1]).any()


def test_a_group_stays_side_by_side(make_env, network):
    """With closed-loop sessions a lane's answers change its arrivals; no lane gets ahead of the others."""
    rollout = Rollout(make_env(8, SESSIONS, group_size=4), network, [100])
    steps = rollout.steps
    assert (steps.lane != np.arange(8)).any()
    for group in range(2):
        columns = slice(4 * group, 4 * group + 4)
        lane, plays, now = (getattr(steps, n)[:, columns].ravel() for n in ("lane", "plays", "now_s"))
        assert set(lane) == set(range(4 * group, 4 * group + 4))
        assert sorted(zip(plays, now, strict=True)) == list(zip(plays, now, strict=True))
    np.testing.assert_array_equal(np.bincount(steps.lane.ravel()), rollout.tally.decisions)


def test_draws_follow_the_policy():
    logits = np.array([0.5, 3.0, -1.0, 1.5, 0.0], np.float32)
    legal = np.array([0, 2, 3])
    chosen, log_probs = np.zeros(40_000, np.int64), np.zeros(40_000)
    draw_many(logits, legal, 7, chosen, log_probs, np.empty(len(legal)))
    share = np.exp(logits[legal].astype(float))
    share /= share.sum()
    counts = np.bincount(chosen, minlength=5) / len(chosen)
    assert counts[1] == counts[4] == 0
    np.testing.assert_allclose(counts[legal], share, atol=4 * 0.5 / len(chosen) ** 0.5)
    np.testing.assert_allclose(np.exp(log_probs), share[np.searchsorted(legal, chosen)], rtol=1e-6)


def test_a_hopeless_candidate_is_never_drawn():
    logits, legal = np.array([200.0, -200.0], np.float32), np.arange(2)
    chosen, log_probs = np.ones(1000, np.int64), np.ones(1000)
    draw_many(logits, legal, 7, chosen, log_probs, np.empty(len(legal)))
    assert (chosen == 0).all() and (log_probs == 0).all()
