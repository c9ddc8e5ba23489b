"""The vector environment as stable-baselines3's VecEnv."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.vec_env import VecEnv

from servegym.envs.cluster.vector import ClusterVectorEnv
from servegym.errors import InputError


class ServeGymVecEnv(VecEnv):
    """Adapter: 4-tuples, a list of infos, `terminal_observation` and `TimeLimit.truncated` as SB3 has them.

    sb3-contrib's MaskablePPO finds the legal answers through `env_method("action_masks")`.

    Args:
        vector_env: an environment with SAME_STEP autoreset, as SB3 resets in the step that ends an episode.

    Raises:
        InputError: for another autoreset mode.
    """

    def __init__(self, vector_env: ClusterVectorEnv) -> None:
        mode = vector_env.metadata["autoreset_mode"]
        if mode != AutoresetMode.SAME_STEP:
            raise InputError("ServeGymVecEnv", "autoreset_mode", mode.value, "SB3 needs SameStep")
        self.vector_env = vector_env
        super().__init__(
            vector_env.num_envs, vector_env.single_observation_space, vector_env.single_action_space
        )
        self._actions = np.zeros(self.num_envs, np.int64)
        self._mask = np.zeros((self.num_envs, vector_env.num_candidates), np.int8)

    def reset(self) -> dict[str, np.ndarray]:
        """Start a new episode on every lane, with the seeds of `seed` where it was called."""
        seeds = [seed for seed in self._seeds if seed is not None] or None
        obs, _ = self.vector_env.reset(seed=seeds)
        self._mask = obs["mask"]
        self.reset_infos = [{} for _ in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        return obs

    def step_async(self, actions: np.ndarray) -> None:
        """Remember the answers."""
        self._actions = actions

    def step_wait(self) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Give the answers and return observation, reward float32 [B], done bool [B], infos."""
        obs, reward, terminated, truncated, info = self.vector_env.step(self._actions)
        self._mask = obs["mask"]
        infos: list[dict[str, Any]] = [{"elapsed_s": elapsed} for elapsed in info["elapsed_s"].tolist()]
        done = terminated | truncated
        for lane in np.flatnonzero(done):
            infos[lane]["terminal_observation"] = {name: info["final_obs"][name][lane].copy() for name in obs}
            infos[lane]["TimeLimit.truncated"] = bool(truncated[lane] and not terminated[lane])
        return obs, reward.astype(np.float32), done, infos

    def close(self) -> None:
        """Close the vector environment."""
        self.vector_env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """An attribute of the vector environment, once for each lane asked for."""
        return [getattr(self.vector_env, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Refused: lanes share their attributes."""
        raise InputError("ServeGymVecEnv", attr_name, value, "lanes share their attributes; set none")

    def env_method(
        self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any
    ) -> list[np.ndarray]:
        """`action_masks`, the only method of single lanes: legal answers, bool [C], of those asked for."""
        if method_name != "action_masks":
            raise AttributeError(f"lanes have no method {method_name!r}, only action_masks")
        return [self._mask[lane].astype(bool) for lane in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """Never: lanes are no environments of their own."""
        return [False for _ in self._get_indices(indices)]

    def has_attr(self, attr_name: str) -> bool:
        """Whether `get_attr` or `env_method` finds it."""
        return attr_name == "action_masks" or hasattr(self.vector_env, attr_name)

    def get_images(self) -> Sequence[np.ndarray | None]:
        """There are none."""
        return [None] * self.num_envs
