"""PPO on graph observations, its checkpoints, and the policy that a checkpoint holds."""

from servegym.agents.ppo.callbacks import CheckpointCallback
from servegym.agents.ppo.checkpoint import CheckpointInfo, read_info, read_network, save_checkpoint
from servegym.agents.ppo.config import PPOConfig
from servegym.agents.ppo.imitation import imitate
from servegym.agents.ppo.improvement import improve
from servegym.agents.ppo.policy import NetworkPolicy, load_policy
from servegym.agents.ppo.ppo import PPO

__all__ = [
    "PPO",
    "CheckpointCallback",
    "CheckpointInfo",
    "NetworkPolicy",
    "PPOConfig",
    "imitate",
    "improve",
    "load_policy",
    "read_info",
    "read_network",
    "save_checkpoint",
]
