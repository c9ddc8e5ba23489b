"""Warm start: learn a teacher's answers before PPO improves on them.

Data set aggregation (DAgger, arXiv 1011.0686) as a stream: at each update the lanes are played by a mixture
of teacher and network, all questions that come up are labelled by the teacher, and the network learns from
their cross-entropy. The mixture goes from the teacher's answers alone to the network's alone, so that the
network learns from states that it leads to. The value head learns the returns of what was played.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from servegym.agents.play import Watcher
from servegym.agents.policy import Policy
from servegym.errors import InputError
from servegym.models.features import ARRAYS

if TYPE_CHECKING:
    from servegym.agents.ppo.ppo import PPO


def imitate(model: PPO, teacher: Policy, updates: int) -> list[float]:
    """Teach the network of a fresh trainer; its lanes are reset before and start anew after.

    The step size falls from PPO's first one to a tenth of it. Decisions are not counted as PPO's.

    Args:
        model: a trainer that has not learned yet.
        teacher: answers the environment's questions; a heuristic, look-ahead, another network.
        updates: roll-outs of the trainer's size, each learned from once per epoch.

    Returns:
        for each update, the part of its questions that the network answered like the teacher, before it.

    Raises:
        InputError: for a trainer that has learned, or a teacher that reads what the environment hides.
    """
    env = model.vector_env
    if model.num_timesteps:
        raise InputError("imitation", "decisions", model.num_timesteps, "imitate before PPO, not during it")
    if teacher.needs_oracle and "oracle" not in cast(spaces.Dict, env.single_observation_space).spaces:
        raise InputError(
            "imitation", "teacher", teacher.name, "reads the oracle; make the environment with it"
        )
    agreements = []
    if isinstance(teacher, Watcher):
        teacher.watch(env)
    with model.ready():
        env.reset(seed=model.seed)
        model.look()
        teacher.reset(env.num_envs, model.seed or 0)
        for update in range(updates):
            for group in model.optimizer.param_groups:
                group["lr"] = model.config.learning_rate * (1.0 - 0.9 * update / updates)
            agreements.append(_play(model, teacher, share=1.0 - update / max(updates - 1, 1)))
            model.estimate()
            for _ in range(model.config.n_epochs):
                for numbers in model.buffer.minibatches(model.config.batch_size, model.generator):
                    model.improve(numbers, partial(_gradient, model), imitate=True)
            model.logger.record("imitation/agreement", agreements[-1])
            model.logger.dump(step=update)
    model.forget_lanes()
    return agreements


def _play(model: PPO, teacher: Policy, share: float) -> float:
    """Fill the buffer with a roll-out in which each answer is the teacher's with probability `share`.

    `actions` receives the teacher's answers, whoever gave the real ones.

    Returns:
        the part of the questions at which the network's favourite was the teacher's answer.
    """
    env, steps, agreed = model.vector_env, model.buffer.steps, 0.0
    steps.lane[:] = np.arange(env.num_envs)
    for t in range(len(steps.lane)):
        for name, rows in model.buffer.obs.items():
            rows[t] = model.observation[name]
        logits, steps.values[t] = _evaluate(model, model.observation)
        steps.actions[t] = teacher.act(model.observation)
        agreed += float((logits.argmax(1).numpy() == steps.actions[t]).mean())
        noise = torch.empty(logits.shape).exponential_(generator=model.generator).clamp_(min=1e-30)
        own = (logits - noise.log_()).argmax(1).numpy()
        is_teacher = torch.rand(env.num_envs, generator=model.generator).numpy() < share
        lanes = env.lanes().world.lane
        steps.now_s[t], steps.plays[t] = lanes["now"] / 1e12, lanes["plays"]
        _, reward, terminated, truncated, info = env.step(np.where(is_teacher, steps.actions[t], own))
        steps.rewards[t], steps.elapsed_s[t] = reward, info["elapsed_s"]
        steps.terminated[t], steps.truncated[t] = terminated, truncated
        cut = np.flatnonzero(truncated & ~terminated)
        if len(cut):
            final = {name: info["final_obs"][name][cut] for name in ARRAYS}
            steps.next_values[t, cut] = _evaluate(model, final)[1]
    steps.lengths[:] = 0
    model.tally.last_values[:] = _evaluate(model, model.observation)[1]
    return agreed / len(steps.lane)


def _evaluate(model: PPO, obs: dict[str, np.ndarray]) -> tuple[Tensor, np.ndarray]:
    with torch.no_grad():
        logits, values = model.network({n: torch.from_numpy(obs[n]).to(model.device) for n in ARRAYS})
    return logits.cpu(), values.cpu().numpy()


def _gradient(model: PPO, numbers: Tensor, weight: float) -> tuple[tuple[Tensor, ...], Tensor]:
    """Gradient of cross-entropy and value loss on some decisions, times `weight`, and the two losses."""
    obs, old = model.buffer.rows(numbers)
    obs, old = ({name: rows.to(model.device) for name, rows in group.items()} for group in (obs, old))
    logits, values = model.network(obs)
    entropy = torch.nn.functional.cross_entropy(logits, old["actions"])
    value_loss = (values - old["targets"]).square().mean()
    loss = entropy + model.config.value_coef * value_loss
    gradients = torch.autograd.grad(weight * loss, list(model.network.parameters()))
    return gradients, weight * torch.stack([entropy, value_loss]).detach().cpu()
