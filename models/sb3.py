"""The graph network as a policy for sb3-contrib's MaskablePPO, on the same environments.

    MaskablePPO(GraphMaskablePolicy, ServeGymVecEnv(env), policy_kwargs={"network": NetworkConfig()})

stable-baselines3 expects features, then layers for actor and critic. Here the network's logits and value
are the features, and everything after them only picks its part.
"""

from __future__ import annotations

from typing import Any

import torch
from gymnasium import spaces
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from servegym.models.config import NetworkConfig
from servegym.models.dense import DenseNetwork


class GraphExtractor(BaseFeaturesExtractor):
    """Logits and value of a `DenseNetwork`, float32 [B, C + 1]."""

    def __init__(self, observation_space: spaces.Dict, network: NetworkConfig | None = None) -> None:
        super().__init__(observation_space, observation_space["mask"].shape[0] + 1)  # type: ignore[index]
        self.network = DenseNetwork(network, seed=int(torch.randint(2**31, ())))

    def forward(self, obs: dict[str, Tensor]) -> Tensor:
        """Evaluate raw observations; `kind` comes as [B] or, from roll-out buffers, as [B, 1]."""
        logits, values = self.network(obs | {"kind": obs["kind"].reshape(-1).long()})
        return torch.cat([logits, values[:, None]], dim=1)


class _Parts(nn.Module):
    """In the place of the actor's and critic's layers: all but the last feature, and the last."""

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: Tensor) -> Tensor:
        return features[:, :-1]

    def forward_critic(self, features: Tensor) -> Tensor:
        return features[:, -1:]


class GraphMaskablePolicy(MaskableActorCriticPolicy):
    """A policy class for MaskablePPO; `policy_kwargs={"network": NetworkConfig(...)}` sets its size."""

    def __init__(self, *args: Any, network: NetworkConfig | None = None, **kwargs: Any) -> None:
        kwargs |= {
            "features_extractor_class": GraphExtractor,
            "features_extractor_kwargs": {"network": network},
            "ortho_init": False,  # the network has initialised itself
        }
        super().__init__(*args, **kwargs)

    def extract_features(self, obs: Any, features_extractor: BaseFeaturesExtractor | None = None) -> Tensor:
        """Apply the network to the observation as it is: one-hot kinds and float indices are not for it."""
        return (features_extractor or self.features_extractor)(obs)

    def get_distribution(self, obs: Any, action_masks: Any = None) -> Any:
        """Distribution over the candidates."""
        logits, _ = self.mlp_extractor(self.extract_features(obs))
        distribution = self._get_action_dist_from_latent(logits)
        if action_masks is not None:
            distribution.apply_masking(action_masks)
        return distribution

    def predict_values(self, obs: Any) -> Tensor:
        """Values, float32 [B, 1]."""
        return self.mlp_extractor.forward_critic(self.extract_features(obs))

    def _build(self, lr_schedule: Any) -> None:
        self.mlp_extractor = _Parts()  # type: ignore[assignment]
        self.action_net = self.value_net = nn.Identity()  # type: ignore[assignment]
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]
