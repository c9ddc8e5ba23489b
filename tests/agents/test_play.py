"""Playing episodes: the same records as the simulator's own rules, each episode in its place."""

import numpy as np
import pytest

from servegym.agents.play import play
from servegym.envs.cluster.episode import make_episodes
from servegym.envs.cluster.simulate import simulate_all
from servegym.envs.scenario import Scenario
from servegym.errors import InputError

MIXED = Scenario(clusters=("2xa100-llama-3.1-8b+1xl40s-llama-3.1-8b", "1xa100-llama-3.1-8b"), requests=40)


class Scripted:
    """Answers with `rule(observation)`."""

    name = "scripted"
    kinds = ("dispatch",)
    kinds = ("dispatch",)

    def __init__(self, rule, needs_oracle=False):
        self.rule, self.needs_oracle, self.resets = rule, needs_oracle, []

    def reset(self, lanes, seed):
        self.resets.append((lanes, seed))

    def act(self, obs):
        return self.rule(obs)


def nothing(obs):
    return np.zeros(len(obs["mask"]), np.int64)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_default_answers_equal_the_models_rule(num_threads):
    episodes = make_episodes(MIXED, 5, 0) + make_episodes(Scenario(clusters=MIXED.clusters, requests=7), 2, 1)
    policy = Scripted(nothing)
    played = play(policy, MIXED, episodes, num_threads=num_threads, seed=9)
    assert policy.resets == [(7, 9)]
    for a, b in zip(played, simulate_all(episodes, "least_request"), strict=True):
        for name, array in vars(b).items():
            np.testing.assert_array_equal(getattr(a, name), array)


def test_oracle_only_on_request():
    episodes = make_episodes(MIXED, 2, 0)
    seen = []

    def look(obs):
        seen.append(obs["oracle"].copy() if "oracle" in obs else None)
        return nothing(obs)

    play(Scripted(look), MIXED, episodes)
    assert all(o is None for o in seen)
    seen.clear()
    play(Scripted(look, needs_oracle=True), MIXED, episodes)
    assert all(o.shape == (2, 4) for o in seen) and max(o.max() for o in seen) > 0


def test_illegal_answers_are_refused():
    def beyond(obs):
        return np.full(len(obs["mask"]), 3)

    with pytest.raises(InputError, match="the cluster has 1 instances"):
        play(Scripted(beyond), MIXED, [e for e in make_episodes(MIXED, 8, 0) if len(e.cluster) == 1])
