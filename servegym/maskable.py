"""sb3-contrib's MaskablePPO behind the interface of our PPO: same network, checkpoints and callbacks.

It knows no semi-Markov time: its discount of a decision is constant, that of the mean time between two.
Rewards are divided by the standard deviation of their discounted sum. A stopped run cannot be resumed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np
from sb3_contrib import MaskablePPO
from stable_baselines3.common.logger import KVWriter, Logger, TensorBoardOutputFormat
from stable_baselines3.common.vec_env import VecNormalize

from servegym.agents.ppo import CheckpointInfo, PPOConfig, save_checkpoint
from servegym.agents.ppo.tracking import WandbWriter
from servegym.agents.task import Task
from servegym.envs.cluster.sb3 import ServeGymVecEnv
from servegym.envs.cluster.vector import ClusterVectorEnv
from servegym.models.config import NetworkConfig
from servegym.models.dense import DenseNetwork
from servegym.models.sb3 import GraphMaskablePolicy

PROBE = 64  # decisions of each lane that say how much time passes between two


class MaskableTrainer(MaskablePPO):
    """MaskablePPO on the vector environment, with the graph network.

    Args:
        env: SAME_STEP and `copy=True`, as stable-baselines3 keeps observations across steps.
        network, config, seed, log_dir, track, task, command, device: as for `servegym.agents.ppo.PPO`;
            of the hyperparameters, gae_horizon_s, anneal and num_threads have no counterpart.
    """

    def __init__(
        self,
        env: ClusterVectorEnv,
        network: NetworkConfig,
        config: PPOConfig,
        seed: int,
        log_dir: str,
        track: str | None,
        task: Task,
        command: str,
        device: str,
    ) -> None:
        gamma = math.exp(-config.beta * mean_elapsed_s(env, seed))
        super().__init__(
            GraphMaskablePolicy,
            VecNormalize(ServeGymVecEnv(env), norm_obs=False, norm_reward=True, gamma=gamma),
            learning_rate=config.learning_rate,
            n_steps=config.n_steps,
            batch_size=config.batch_size,
            n_epochs=config.n_epochs,
            gamma=gamma,
            clip_range=config.clip_range,
            ent_coef=config.entropy_coef,
            vf_coef=config.value_coef,
            max_grad_norm=config.max_grad_norm,
            target_kl=config.target_kl or None,
            policy_kwargs={"network": network},
            seed=seed,
            device=device,
        )
        self.config, self.task, self.command = config, task, command
        writers: list[KVWriter] = [TensorBoardOutputFormat(log_dir)]
        if track is not None:
            writers.append(WandbWriter(track, log_dir, {"task": vars(task), "ppo": vars(config)}))
        self.set_logger(Logger(log_dir, writers))

    @property
    def network(self) -> DenseNetwork:
        """The network that is trained."""
        return self.policy.features_extractor.network  # type: ignore[union-attr, return-value]

    @property
    def observation(self) -> dict[str, np.ndarray]:
        """What the lanes look like now."""
        return cast(dict[str, np.ndarray], self._last_obs)

    def save(  # type: ignore[override]
        self, folder: str | Path, extra: Mapping[str, str] | None = None, resumable: bool = False
    ) -> None:
        """Write a checkpoint that plays; `resumable` is accepted for PPO's sake."""
        info = CheckpointInfo(
            network=self.network.config,
            ppo=self.config,
            task=self.task,
            command=self.command,
            seed=self.seed or 0,
            steps=self.num_timesteps,
            total_steps=self._total_timesteps,
        )
        save_checkpoint(folder, info, self.network, extra=extra)


def mean_elapsed_s(env: ClusterVectorEnv, seed: int) -> float:
    """Mean seconds between two decisions of a lane, under the default answers; resets the environment."""
    env.reset(seed=seed)
    answers = np.zeros(env.num_envs, np.int64)
    return float(np.mean([env.step(answers)[4]["elapsed_s"] for _ in range(PROBE)]))
