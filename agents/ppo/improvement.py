"""Learning from look-ahead: the network plays, and search says what its answers would have led to.

The search scores the answers to a question on the true future (`servegym.agents.search.lookahead`), so the
policy gradient needs no sampled returns: its expectation over all answers that were tried is exact,
sum_c pi(c) (score(c) - sum_d pi(d) score(d)), the all-action gradient (Sutton et al., "Comparing
Policy-Gradient Algorithms", 2001). It climbs the search's objective itself, such as goodput, which counts
requests and so gives no other gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from servegym.agents.ppo.buffer import take
from servegym.agents.ppo.rollout import Steps
from servegym.agents.search.lookahead import Lookahead
from servegym.errors import InputError
from servegym.models.features import ARRAYS

if TYPE_CHECKING:
    from servegym.agents.ppo.ppo import PPO

STRIDE = 16  # decisions that a lane plays from one label to the next: neighbours say much the same
LARGEST = 3.0  # most that a score counts, in running standard deviations: one question must not outweigh all


class Labels:
    """Questions of N lanes at R times, and what their answers are worth.

    Attributes:
        obs: observations, [R, B, ...] by name.
        scores: float32 [R, B, C], differences to the best answer, 0 or less; -inf for answers not tried.
    """

    def __init__(self, rounds: int, like: dict[str, np.ndarray]) -> None:
        self.obs = {name: np.zeros((rounds, *rows.shape[1:]), rows.dtype) for name, rows in like.items()}
        self.scores = np.zeros(self.obs["mask"].shape, np.float32)

    def put(self, k: int, observation: dict[str, np.ndarray], scores: np.ndarray) -> None:
        """Keep the k-th questions and their scores, float64 [B, C]."""
        for name in ARRAYS:
            self.obs[name][k] = observation[name]
        best = scores.max(1, keepdims=True)
        self.scores[k] = np.where(np.isfinite(best), scores - np.where(np.isfinite(best), best, 0.0), -np.inf)

    @property
    def matters(self) -> np.ndarray:
        """The numbers of the questions whose answers differ, int64 [at most R B]."""
        rows = self.scores.reshape(-1, self.scores.shape[-1])
        return np.flatnonzero((np.isfinite(rows) & (rows < 0.0)).any(1))


def improve(model: PPO, search: Lookahead, updates: int) -> list[float]:
    """Teach the network of a fresh trainer what look-ahead finds; its lanes are reset before and start anew.

    The network's own answers, drawn, are played; every 16th question of a lane is labelled. Questions whose
    answers all come out alike teach nothing. The step size falls from PPO's first one to a tenth of it.

    Args:
        model: a trainer that has not learned yet; it may have imitated.
        search: what scores the answers.
        updates: roll-outs of the trainer's size, each learned from once per epoch.

    Returns:
        for each update, the mean over labelled questions that matter of what the network's answers fall short
        of the best tried, in units of the search's objective, before it.

    Raises:
        InputError: for a trainer that has learned.
    """
    if model.num_timesteps:
        raise InputError("look-ahead", "decisions", model.num_timesteps, "improve before PPO, not during it")
    env = model.vector_env
    regrets, spread = [], _Spread()
    with model.ready():
        search.watch(env)
        env.reset(seed=model.seed)
        model.look()
        labels = Labels(-(-model.config.n_steps // STRIDE), model.buffer.obs)
        for update in range(updates):
            _play(model, search, labels)
            model.estimate()
            for group in model.optimizer.param_groups:
                group["lr"] = model.config.learning_rate * (1.0 - 0.9 * update / updates)
            regrets.append(_learn(model, labels, spread))
            model.logger.record("lookahead/regret", regrets[-1])
            model.logger.dump(step=update)
    model.forget_lanes()
    return regrets


class _Spread:
    """Running root mean square of advantages, plain over the first twenty updates."""

    def __init__(self) -> None:
        self.square, self.count = 0.0, 0

    def update(self, square: float) -> float:
        self.count += 1
        self.square += max(1.0 / self.count, 0.05) * (square - self.square)
        return max(self.square, 1e-12) ** 0.5


def _play(model: PPO, search: Lookahead, labels: Labels) -> None:
    """Fill the trainer's roll-out and label the questions that are open every `STRIDE` decisions."""
    weights = {name: p.detach().cpu().numpy() for name, p in model.network.state_dict().items()}
    for k in range(len(labels.scores)):
        search.act(model.observation)
        labels.put(k, model.observation, search.scores)
        part = slice(k * STRIDE, (k + 1) * STRIDE)
        obs = {name: rows[part] for name, rows in model.buffer.obs.items()}
        model.collector.run(weights, obs, Steps(*(rows[part] for rows in model.buffer.steps)), model.tally)
    model.buffer.steps.lengths[:] = 0  # these episodes are not PPO's


def _learn(model: PPO, labels: Labels, spread: _Spread) -> float:
    """The updates from a roll-out and its labels; `improve` says what comes back."""
    questions = torch.from_numpy(labels.matters)
    if not len(questions):
        return 0.0
    size, generator = model.config.batch_size, model.generator
    with torch.no_grad():
        found = [_judge(model, labels, part) for part in questions.split(size)]
    regret, square = torch.stack([torch.stack([r.sum(), s.sum()]) for r, s in found]).sum(0) / len(questions)
    scale = spread.update(float(square))
    for _ in range(model.config.n_epochs):
        order = torch.randperm(len(questions), generator=generator)
        played = torch.randint(model.buffer.targets.size, (len(questions),), generator=generator)
        for pairs in torch.stack([questions[order], played], 1).split(size):
            model.take_step(pairs, lambda part, weight: _gradient(model, labels, scale, part, weight))
    return float(regret)


def _judge(model: PPO, labels: Labels, questions: Tensor) -> tuple[Tensor, Tensor]:
    """What the network's answers fall short of the best, and their mean squared advantage, [N] each."""
    log_probs, scores = _answers(model, labels, questions)
    probs, advantages = log_probs.exp(), _advantages(log_probs, scores)
    return -(probs * scores).sum(1), (probs * advantages.square()).sum(1)


def _answers(model: PPO, labels: Labels, questions: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of the network's probabilities and the scores, float32 [N, C] each.

    What the search did not try looked worse to it than all that it tried, and counts as the worst of that.
    """
    obs = take(labels.obs, questions)
    scores = torch.from_numpy(labels.scores).flatten(0, 1).index_select(0, questions)
    worst = scores.masked_fill(scores.isinf(), 0.0).amin(1, keepdim=True)
    scores = torch.where(scores.isinf(), worst, scores).to(model.device)
    logits, _ = model.network({name: rows.to(model.device) for name, rows in obs.items()})
    return torch.log_softmax(logits, -1), scores


def _advantages(log_probs: Tensor, scores: Tensor) -> Tensor:
    return scores - (log_probs.detach().exp() * scores).sum(1, keepdim=True)


def _gradient(
    model: PPO, labels: Labels, scale: float, pairs: Tensor, weight: float
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Gradient of policy and value loss times `weight`, and the two losses.

    Args:
        model: the trainer.
        labels: questions and scores.
        scale: advantages are divided by it.
        pairs: int64 [N, 2], a labelled question for the policy and a decision of the roll-out for the value.
        weight: of these pairs in the minibatch.
    """
    log_probs, scores = _answers(model, labels, pairs[:, 0])
    probs = log_probs.exp()
    advantages = (_advantages(log_probs, scores) / scale).clamp(-LARGEST, LARGEST)
    policy_loss = -(probs * advantages).sum(1).mean()
    entropy = -(probs * log_probs).sum(1).mean()
    obs, old = model.buffer.rows(pairs[:, 1])
    _, values = model.network({name: rows.to(model.device) for name, rows in obs.items()})
    value_loss = (values - old["targets"].to(model.device)).square().mean()
    loss = policy_loss + model.config.value_coef * value_loss - model.config.entropy_coef * entropy
    gradients = torch.autograd.grad(weight * loss, list(model.network.parameters()))
    return gradients, weight * torch.stack([policy_loss, value_loss]).detach().cpu()
