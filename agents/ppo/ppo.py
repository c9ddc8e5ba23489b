"""Proximal policy optimisation (arXiv 1707.06347) over graph observations and semi-Markov time.

Stands on stable-baselines3 for the training loop, callbacks, logger and progress bar; collection and
update are its own: roll-outs are played inside the lanes, network included, and on a CPU their gradients are
computed there, too. Steps are torch's Adam, and so are gradients on other devices.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from gymnasium.spaces import Dict
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.logger import KVWriter, Logger, TensorBoardOutputFormat
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import LinearSchedule, explained_variance, safe_mean
from torch import Tensor

from servegym.agents.ppo.advantage import comparable, gae, group_relative, real_values
from servegym.agents.ppo.buffer import ReturnNormalizer, RolloutBuffer
from servegym.agents.ppo.checkpoint import CheckpointInfo, read_network, save_checkpoint
from servegym.agents.ppo.config import PPOConfig
from servegym.agents.ppo.gradient import STATISTICS, KernelGradient
from servegym.agents.ppo.interrupt import DeferredInterrupt
from servegym.agents.ppo.policy import NetworkPolicy
from servegym.agents.ppo.resume import load_state, optimizer_state, trainer_state
from servegym.agents.ppo.rollout import Collector, make_tally
from servegym.agents.ppo.tracking import WandbWriter
from servegym.agents.task import Task
from servegym.envs.cluster.vector import ClusterVectorEnv
from servegym.errors import InputError
from servegym.models.config import NetworkConfig
from servegym.models.dense import DenseNetwork

PHASES = ("collect", "advantage", "update")
# Gradients and statistics of a loss on some decisions, both times a weight.
Gradient: TypeAlias = Callable[[Tensor, float], tuple[tuple[Tensor, ...], Tensor]]


class PPO(OnPolicyAlgorithm):
    """Trains a `DenseNetwork` on a vector environment of clusters.

    Callbacks hear of a roll-out's steps, `on_step` for each, when it has been played.

    Args:
        env: resets lanes in the SAME_STEP mode.
        network: size of the network.
        config: hyperparameters.
        seed: of the initial weights, the environment's first reset, sampling and minibatches.
        log_dir: folder for TensorBoard's event files; None logs nothing.
        track: project of Weights & Biases; None does not track. Without an account the run is kept offline.
        task: what is trained on, for the checkpoint.
        command: how the training was started, for the checkpoint.
        device: torch's name of the device that the network lives on.

    Raises:
        InputError: for an environment that resets lanes in another way.
    """

    def __init__(
        self,
        env: ClusterVectorEnv,
        network: NetworkConfig | None = None,
        config: PPOConfig | None = None,
        seed: int = 0,
        log_dir: str | Path | None = None,
        track: str | None = None,
        task: Task | None = None,
        command: str = "",
        device: str = "cpu",
    ) -> None:
        mode = env.metadata.get("autoreset_mode")
        if mode != AutoresetMode.SAME_STEP:
            raise InputError("environment", "autoreset_mode", mode, "PPO needs AutoresetMode.SAME_STEP")
        self.config = config = config or PPOConfig()
        last_rate = 0.0 if config.anneal else config.learning_rate
        super().__init__(
            policy=ActorCriticPolicy,
            env=None,  # type: ignore[arg-type]  # stable-baselines3 would wrap it into its own VecEnv
            learning_rate=LinearSchedule(config.learning_rate, last_rate, 1.0),
            n_steps=config.n_steps,
            gamma=1.0,  # replaced by exp(-beta * elapsed seconds)
            gae_lambda=1.0,  # replaced by exp(-elapsed seconds / gae_horizon_s)
            ent_coef=config.entropy_coef,
            vf_coef=config.value_coef,
            max_grad_norm=config.max_grad_norm,
            use_sde=False,
            sde_sample_freq=-1,
            device=device,
            seed=seed,
            _init_setup_model=False,
        )
        self.env = self.vector_env = env  # type: ignore[assignment]
        self.n_envs = env.num_envs
        self.observation_space, self.action_space = env.single_observation_space, env.single_action_space
        self.task, self.command = task or Task(), command
        self._setup_lr_schedule()
        self.network = DenseNetwork(network, seed).to(self.device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=config.learning_rate, eps=1e-5)
        self.normalizer = ReturnNormalizer()
        self.generator = torch.Generator().manual_seed(seed)
        space = cast("Dict", env.single_observation_space)
        self.buffer = RolloutBuffer(config.n_steps, self.n_envs, space)
        self.kernel = KernelGradient(self.buffer, self.network.config, config)
        self.rollout_buffer = self.buffer  # type: ignore[assignment]
        self.observation: dict[str, np.ndarray] = {}
        self.tally = make_tally(self.n_envs)
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._set_writers(log_dir, track)

    def _set_writers(self, log_dir: str | Path | None, track: str | None) -> None:
        writers: list[KVWriter] = []
        if log_dir is not None:
            writers.append(TensorBoardOutputFormat(str(log_dir)))
        if track is not None:
            about = {"ppo": vars(self.config), "network": vars(self.network.config), "seed": self.seed}
            writers.append(WandbWriter(track, log_dir, about | {"task": vars(self.task)}))
        self.set_logger(Logger(None if log_dir is None else str(log_dir), writers))

    @classmethod
    def resume(
        cls,
        folder: str | Path,
        env: ClusterVectorEnv,
        log_dir: str | Path | None = None,
        track: str | None = None,
        device: str = "cpu",
    ) -> PPO:
        """Continue from a checkpoint; the run then equals one that never stopped, bit for bit.

        Args:
            folder: a checkpoint with trainer and environment state.
            env: made as the one that was trained on; its lanes are restored.
            log_dir, track, device: as for a new run.

        Raises:
            InputError: for a checkpoint that is damaged, not resumable, or of another environment.
        """
        network, info = read_network(folder)
        model = cls(env, info.network, info.ppo, info.seed, log_dir, track, info.task, info.command, device)
        model.network.load_state_dict(network.state_dict())
        model.num_timesteps, model._total_timesteps = info.steps, info.total_steps
        load_state(model, Path(folder))
        return model

    def save(  # type: ignore[override]
        self, folder: str | Path, extra: Mapping[str, str] | None = None, resumable: bool = True
    ) -> None:
        """Write a checkpoint; see `servegym.agents.ppo.checkpoint`.

        Args:
            folder: replaced as a whole.
            extra: further text files by name, for example the model card.
            resumable: keep the state of trainer and environment too.
        """
        info = CheckpointInfo(
            network=self.network.config,
            ppo=self.config,
            task=self.task,
            command=self.command,
            seed=self.seed or 0,
            steps=self.num_timesteps,
            total_steps=self._total_timesteps,
        )
        states: tuple[Any, Any, Any] = (None, None, None)
        if resumable and self.observation:
            states = optimizer_state(self), trainer_state(self), self.vector_env.save_state()
        save_checkpoint(folder, info, self.network, *states, extra=extra)

    def predict(  # type: ignore[override]
        self, observation: Mapping[str, np.ndarray], *_: Any, **__: Any
    ) -> tuple[np.ndarray, None]:
        """The network's favourite answers to a batch of observations, int64 [B], and no state."""
        return NetworkPolicy(self.network).act(observation), None

    def learn(  # type: ignore[override]
        self,
        total_timesteps: int,
        callback: Any = None,
        log_interval: int = 1,
        progress_bar: bool = False,
    ) -> PPO:
        """Train until `num_timesteps` decisions are done, those before a resume included.

        Ctrl-C is heard after the update in progress: callbacks see the end of training, and the checkpoint
        that they save is a place to resume from. A second Ctrl-C interrupts at once.

        Args:
            total_timesteps: decisions over all lanes; the step size anneals towards this number.
            callback: stable-baselines3's callbacks.
            log_interval: updates between two log entries.
            progress_bar: show stable-baselines3's progress bar.

        Raises:
            KeyboardInterrupt: after Ctrl-C.
        """
        if not self.observation:
            self.vector_env.reset(seed=self.seed)
            self.look()
        self._last_obs = self.observation  # so that stable-baselines3 does not reset again
        remaining = total_timesteps - self.num_timesteps
        with DeferredInterrupt() as self._interrupt, self.ready():
            super().learn(remaining, callback, log_interval, "PPO", False, progress_bar)
        return self

    @contextmanager
    def ready(self) -> Iterator[None]:
        """While this context is open there are threads for roll-outs and updates, and torch adds none."""
        threads, workers = torch.get_num_threads(), ThreadPoolExecutor(self.config.num_threads)
        torch.set_num_threads(1)
        self.collector = Collector(
            self.vector_env, self.network.config, self.config.num_threads, self.seed or 0
        )
        try:
            with workers as self._workers:
                yield
        finally:
            self.collector.close()
            torch.set_num_threads(threads)

    def look(self) -> None:
        """Let `observation` be the lanes' open questions, in the environment's own memory."""
        frame = self.vector_env.lanes().frame
        self.observation = {name: rows for name, rows in frame._asdict().items() if rows.size}

    def forget_lanes(self) -> None:
        """Begin with a reset of the environment."""
        self.observation, self.tally = {}, make_tally(self.n_envs)

    def collect_rollouts(self, env: Any, callback: Any, rollout_buffer: Any, n_rollout_steps: int) -> bool:
        """Play `n_rollout_steps` decisions a lane and estimate their advantages.

        Returns:
            False where training is to stop: after Ctrl-C, or because a callback says so.
        """
        if self._interrupt.pending:
            return False
        started = time.perf_counter()
        callback.on_rollout_start()
        weights = {name: p.detach().cpu().numpy() for name, p in self.network.state_dict().items()}
        self.collector.run(weights, self.buffer.obs, self.buffer.steps, self.tally)
        collected = time.perf_counter()
        self.estimate()
        self._seconds["collect"] += collected - started
        self._seconds["advantage"] += time.perf_counter() - collected
        for _ in range(n_rollout_steps):
            self.num_timesteps += self.n_envs
            callback.update_locals(locals())
            if not callback.on_step():
                return False
        callback.on_rollout_end()
        return True

    def train(self) -> None:
        """Improve the network on the last roll-out."""
        started = time.perf_counter()
        # By the decisions before this roll-out: stable-baselines3 counts it, too, so that an annealed rate
        # would be 0 at the last update.
        before = self.num_timesteps - self.n_steps * self.n_envs
        self._current_progress_remaining = 1.0 - before / self._total_timesteps
        self._update_learning_rate(self.optimizer)
        epochs, kl = 0, 0.0
        while epochs < self.config.n_epochs and not 0.0 < self.config.target_kl < kl:
            minibatches = self.buffer.minibatches(self.config.batch_size, self.generator)
            steps = [self.improve(numbers, self._gradient) for numbers in minibatches]
            statistics = torch.stack(steps).mean(0).tolist()
            kl = statistics[STATISTICS.index("approx_kl")]
            epochs += 1
        self._n_updates += epochs
        self._seconds["update"] += time.perf_counter() - started
        for name, value in zip(STATISTICS, statistics, strict=True):
            self.logger.record(f"losses/{name}", value)
        self.logger.record("losses/epochs", epochs)

    def dump_logs(self, iteration: int = 0) -> None:
        """Write the log under CleanRL's stable names, with the share of each phase in the time."""
        elapsed = max((time.time_ns() - self.start_time) / 1e9, 1e-9)
        self.logger.record("charts/SPS", (self.num_timesteps - self._num_timesteps_at_start) / elapsed)
        if self.ep_info_buffer:
            self.logger.record("charts/episodic_return", safe_mean([e["r"] for e in self.ep_info_buffer]))
            self.logger.record("charts/episodic_length", safe_mean([e["l"] for e in self.ep_info_buffer]))
        total = max(sum(self._seconds.values()), 1e-9)
        for phase, seconds in self._seconds.items():
            self.logger.record(f"time/{phase}", seconds / total)
        self.logger.dump(step=self.num_timesteps)
        self._seconds = dict.fromkeys(self._seconds, 0.0)

    def estimate(self) -> None:
        """Advantages, and targets for the value head in units of the returns seen so far."""
        buffer, steps, scale = self.buffer, self.buffer.steps, self.normalizer
        if not (np.isfinite(steps.rewards).all() and np.isfinite(steps.values).all()):
            raise InputError("environment", "rewards, values", "not finite", "a bad reward or observation")
        for r, length in zip(steps.returns[steps.lengths > 0], steps.lengths[steps.lengths > 0], strict=True):
            self.ep_info_buffer.append({"r": r, "l": length})  # type: ignore[union-attr]
        values, next_values = real_values(steps, self.tally, scale.mean, scale.std)
        advantages = gae(steps, values, next_values, self.config.beta, self.config.gae_horizon_s)
        returns = values + advantages
        explained = explained_variance(values.ravel(), returns.ravel())
        self.logger.record("losses/explained_variance", explained)
        self._rescale_values(returns)
        buffer.targets[:] = (returns - scale.mean) / scale.std
        env = self.vector_env
        advantages = group_relative(steps, advantages, env.group_size)
        alike = env.num_envs if len(env.scenarios) == 1 else env.group_size
        buffer.advantages[:] = comparable(advantages, alike)

    def _rescale_values(self, returns: np.ndarray) -> None:
        """Update the normaliser and, as PopArt does (arXiv 1602.07714), keep what the value head says."""
        mean, std, fresh = self.normalizer.mean, self.normalizer.std, self.normalizer.count == 0
        self.normalizer.update(returns)
        if fresh:
            return
        head = self.network.value_out
        with torch.no_grad():
            head.weight *= std / self.normalizer.std
            head.bias.copy_((head.bias * std + mean - self.normalizer.mean) / self.normalizer.std)

    def improve(self, numbers: Tensor, gradient: Gradient, imitate: bool = False) -> Tensor:
        """One step on a minibatch of the roll-out, on a CPU with the kernel's gradient.

        Args:
            numbers: of decisions in the buffer.
            gradient: the same in torch, for other devices.
            imitate: what `KernelGradient` calls so.

        Returns:
            the gradient's statistics.
        """
        if self.device.type != "cpu":
            return self.take_step(numbers, gradient)
        self.kernel.load(self.network.state_dict())
        return self.take_step(numbers, partial(self._kernel_gradient, imitate=imitate))

    def take_step(self, numbers: Tensor, gradient: Gradient) -> Tensor:
        """One step of Adam on a minibatch, its gradient computed in as many parts as there are threads.

        Args:
            numbers: of decisions in the buffer.
            gradient: gets some of them and their weight in the minibatch.

        Returns:
            the statistics of `gradient`, summed over the parts.
        """
        shares = numbers.chunk(self.config.num_threads)
        run = self._workers.map if len(shares) > 1 else map
        parts = list(run(lambda share: gradient(share, len(share) / len(numbers)), shares))
        for i, parameter in enumerate(self.network.parameters()):
            parameter.grad = sum((gradients[i] for gradients, _ in parts[1:]), start=parts[0][0][i])
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        return torch.stack([statistics for _, statistics in parts]).sum(0)

    def _kernel_gradient(
        self, numbers: Tensor, weight: float, imitate: bool = False
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """As `_gradient`, but computed inside a kernel."""
        gradient, statistics = self.kernel(numbers, weight, imitate)
        names = (name for name, _ in self.network.named_parameters())
        return tuple(torch.from_numpy(gradient[name]) for name in names), statistics

    def _gradient(self, numbers: Tensor, weight: float) -> tuple[tuple[Tensor, ...], Tensor]:
        """Gradient and `STATISTICS` of the clipped objective on some decisions, times `weight`."""
        obs, old = self.buffer.rows(numbers)
        obs, old = ({name: rows.to(self.device) for name, rows in group.items()} for group in (obs, old))
        logits, values = self.network(obs)
        log_probs = torch.log_softmax(logits, -1)
        log_ratio = log_probs.gather(1, old["actions"][:, None])[:, 0] - old["log_probs"]
        ratio = log_ratio.exp()
        clip = self.config.clip_range
        gain = torch.min(ratio * old["advantages"], ratio.clamp(1 - clip, 1 + clip) * old["advantages"])
        policy_loss = -gain.mean()
        value_loss = (values - old["targets"]).square().mean()
        entropy = -(log_probs.exp() * log_probs).sum(1).mean()
        loss = policy_loss + self.config.value_coef * value_loss - self.config.entropy_coef * entropy
        gradients = torch.autograd.grad(weight * loss, list(self.network.parameters()))
        with torch.no_grad():
            approx_kl = (ratio - 1 - log_ratio).mean()  # http://joschu.net/blog/kl-approx.html
            clipfrac = ((ratio - 1).abs() > clip).float().mean()
            statistics = weight * torch.stack([policy_loss, value_loss, entropy, approx_kl, clipfrac])
        return gradients, statistics.cpu()
