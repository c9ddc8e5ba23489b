"""PPO on graph observations, its checkpoints, and the policy that a checkpoint holds."""

from servegym.agents.ppo.config import PPOConfig
from servegym.agents.ppo.ppo import PPO

__all__ = ["PPO", "PPOConfig"]
