"""Look-ahead's labels raise the answers that it scores best and leave indifferent questions alone."""

import numpy as np
import pytest
import torch

from servegym.agents.ppo import PPO, NetworkPolicy, PPOConfig, improve
from servegym.agents.search.lookahead import Lookahead
from servegym.envs.cluster.episode import make_episodes
from servegym.errors import InputError
from servegym.evaluation import measure
from servegym.models.config import NetworkConfig
from servegym.models.features import ARRAYS

CONFIG = PPOConfig(
    n_steps=32, batch_size=128, learning_rate=1e-2, num_threads=1, entropy_coef=0.0, value_coef=0.0
)
BEST = 2


class Scripted(Lookahead):
    """Says that instance 1 is better than all others, at every second question only, or at none."""

    def __init__(self, every):
        super().__init__()
        self._every, self._asked = every, 0

    def watch(self, env):
        self.scores = np.full((env.num_envs, env.num_candidates), -np.inf)

    def act(self, obs):
        self._asked += 1
        self.scores[:] = np.where(obs["mask"], 5.0, -np.inf)
        if self._every and self._asked % self._every == 0:
            self.scores[:, BEST] += 1.0
        else:
            self.scores[:, BEST + 1] = -np.inf  # not tried: neither better nor worse
        return np.zeros(len(obs["mask"]), np.int64)


def trainer(env):
    return PPO(env, NetworkConfig(16, 1), CONFIG, seed=0)


def chances(model):
    """The network's mean probability of each answer at the questions of its last roll-out."""
    with torch.no_grad():
        logits, _ = model.network({n: torch.from_numpy(model.buffer.obs[n]).flatten(0, 1) for n in ARRAYS})
    return torch.softmax(logits, 1).mean(0)


def weights(model):
    named = model.network.named_parameters()
    # The value head is rescaled at every roll-out, whatever is learned.
    return torch.cat([p.detach().flatten() for name, p in named if "value_out" not in name])


@pytest.mark.parametrize("every", [1, 2])
def test_the_better_answer_becomes_likelier(make_env, every):
    model = trainer(make_env(16))
    regrets = improve(model, Scripted(every), 30)
    assert regrets[0] > 0.5  # 4 answers, the best of them a request better
    assert regrets[-1] < 0.15
    assert chances(model)[BEST] > 0.7  # a third at first


def test_indifferent_questions_teach_nothing(make_env):
    model = trainer(make_env(16))
    before = weights(model)
    assert improve(model, Scripted(0), 2) == [0.0, 0.0]
    assert torch.equal(weights(model), before)


def latency(model):
    scenario = model.vector_env.scenarios[0]
    return measure(NetworkPolicy(model.network), scenario, make_episodes(scenario, 8, 7)).samples[
        "e2e_mean_s"
    ]


def test_what_look_ahead_finds_makes_a_better_policy(make_env):
    model = trainer(make_env(16))
    before = latency(model)
    improve(model, Lookahead("latency", behind=[{"dispatch": "lmetric"}], horizon_s=1.0), 30)
    assert latency(model).mean() < 0.8 * before.mean()


def test_training_goes_on_and_repeats(make_env):
    found = []
    for _ in range(2):
        model = trainer(make_env(8, group_size=4))
        improve(model, Lookahead(horizon_s=1.0, width=1), 2)
        model.learn(8 * 32)
        assert (model.tally.decisions == 32).all()
        found.append(weights(model))
    assert torch.equal(*found)


def test_only_before_ppo(make_env):
    model = trainer(make_env(8)).learn(8 * 32)
    with pytest.raises(InputError, match="before PPO"):
        improve(model, Lookahead(), 1)
