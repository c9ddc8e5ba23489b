"""A vector environment in which the best answer is the instance with the fewest requests in flight."""

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, VectorEnv

from servegym.envs.cluster import schema
from servegym.models.features import WIDTH

INFLIGHT = schema.column(schema.INSTANCE, "inflight")


class LeastInflight(VectorEnv):
    """Reward 1 for the least loaded instance, else 0; episodes of 8 to 15 decisions, every third truncated.

    Rows change from lane to lane: lane b has 2 to I instances. Each decision takes a tenth of a second.
    """

    def __init__(self, num_envs=16, instances=6):
        self.num_envs, self.instances = num_envs, instances
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space = gymnasium.spaces.Dict(
            {
                name: gymnasium.spaces.Box(-np.inf, np.inf, a.shape[1:], a.dtype)
                for name, a in self._draw(0, 0).items()
            }
        )
        self.single_action_space = gymnasium.spaces.Discrete(instances + 1)
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, num_envs)
        self.observation_space = gymnasium.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.seed, self.clock, self.age = 0, 0, np.zeros(num_envs, np.int64)

    def _draw(self, seed, clock):
        rng = np.random.default_rng([seed, clock])
        lanes, size, count = self.num_envs, self.instances, self.instances + 1
        real = 2 + np.arange(lanes) % (size - 1)
        candidates = np.zeros((lanes, count, 2), np.int32)
        candidates[:, 1:, 1] = np.arange(size)
        candidates[:, 0, 1] = rng.integers(0, real)
        mask = np.concatenate([np.ones((lanes, 1), bool), np.arange(size) < real[:, None]], 1)
        edges = np.zeros((lanes, count, WIDTH["edges"]), np.float32)
        edges[:, 0, 0] = 1
        instances = np.zeros((lanes, size, WIDTH["instances"]), np.float32)
        instances[..., INFLIGHT] = rng.integers(0, 30, (lanes, size))
        context = np.zeros((lanes, WIDTH["globals"]), np.float32)
        context[:, 0] = real
        return {
            "instances": instances,
            "requests": np.ones((lanes, 1, WIDTH["requests"]), np.float32),
            "candidates": candidates,
            "edges": edges,
            "globals": context,
            "history": np.ones((lanes, WIDTH["history"]), np.float32),
            "instance_mask": mask[:, 1:].astype(np.int8),
            "mask": mask.astype(np.int8),
            "kind": np.zeros(lanes, np.int64),
        }

    def reset(self, *, seed=None, options=None):
        self.seed, self.clock = seed or 0, 0
        self.age[:] = 0
        self.obs = self._draw(self.seed, self.clock)
        return self.obs, {}

    def step(self, actions):
        lanes = np.arange(self.num_envs)
        assert (self.obs["mask"][lanes, actions] == 1).all(), "an illegal answer"
        load = np.where(self.obs["instance_mask"] == 1, self.obs["instances"][..., INFLIGHT], np.inf)
        chosen = self.obs["candidates"][lanes, actions, 1]
        reward = (load[lanes, chosen] == load.min(1)).astype(np.float64)
        self.age += 1
        self.clock += 1
        ends = self.age >= 8 + (lanes + self.clock) % 8
        truncated = ends & (lanes % 3 == 0)
        self.age[ends] = 0
        info = {"elapsed_s": np.full(self.num_envs, 0.1)}
        if ends.any():
            info |= {"final_obs": self._draw(self.seed + 1, self.clock), "_final_obs": ends}
        for name, rows in self._draw(self.seed, self.clock).items():
            self.obs[name][:] = rows  # in place, as with copy=False
        return self.obs, reward, ends & ~truncated, truncated, info

    def save_state(self):
        return {"clock": np.array([self.seed, self.clock]), "age": self.age.copy()}

    def load_state(self, state):
        self.seed, self.clock = (int(x) for x in state["clock"])
        self.age[:] = state["age"]
        self.obs = self._draw(self.seed, self.clock)


@pytest.fixture(scope="session")
def least_inflight():
    """The class itself: tests ask for the sizes they need."""
    return LeastInflight
