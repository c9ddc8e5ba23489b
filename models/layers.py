"""The parameters of the graph network, shared by its dense, graph and numpy forms.

With H = hidden, widths of the schema (INSTANCE, REQUEST, EDGE, GLOBAL, HISTORY) and K kinds, the names in
`policy.safetensors` are (weights are [out, in], as in torch):

    instance_in, request_in            weight [H, INSTANCE] / [H, REQUEST], bias [H]
    context_in                         weight [H, GLOBAL + HISTORY], bias [H]
    kind.weight                        [K, H]
    blocks.L.message_instance          weight [H, H]           blocks.L.message_request   weight [H, H]
    blocks.L.message_edge              weight [H, EDGE], bias [H]
    blocks.L.pool                      weight [H, 2 H], bias [H]
    blocks.L.instance_message, blocks.L.request_message        weight [H, H], bias [H]
    blocks.L.instance_context, blocks.L.request_context        weight [H, H]
    head_instance, head_request, head_context                  weight [H, H]
    head_edge                          weight [H, EDGE], bias [H]
    head_score                         weight [1, H]
    value_hidden                       weight [H, 3 H], bias [H]
    value_out                          weight [1, H], bias [1]

One block, for candidates c that join request r(c) and instance i(c) and are legal; x, q, g are the
embeddings of instances, requests and the whole cluster, all >= 0:

    m_c  = relu(message_instance x_i(c) + message_request q_r(c) + message_edge e_c)
    g   <- relu(g + pool [mean_i x_i, max_i x_i])                      over the real instances
    x_i <- relu(x_i + instance_message mean_{c: i(c)=i} m_c + instance_context g)
    q_r <- relu(q_r + request_message  mean_{c: r(c)=r} m_c + request_context  g)

The head is an additive pointer (Vinyals et al., 2015, arXiv 1506.03134) over the candidates, the value an
MLP over the pooled cluster:

    logit_c = head_score relu(head_instance x_i(c) + head_request q_r(c) + head_context g + head_edge e_c)
    value   = value_out relu(value_hidden [g, mean_i x_i, max_i x_i])

Candidate 0 has no parameters of its own: it shares the embedding of the instance that its row names and
differs by its edge, where is_default = 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from servegym.envs.cluster import schema
from servegym.models import features
from servegym.models.config import NetworkConfig


class Scaling(nn.Module):
    """Scales raw observations as `servegym.models.features` does; its constants are no parameters."""

    def __init__(self) -> None:
        super().__init__()
        for name in features.TABLES:
            self.register_buffer(f"{name}_scale", torch.from_numpy(features.SCALE[name]), persistent=False)
            self.register_buffer(f"{name}_is_log", torch.from_numpy(features.IS_LOG[name]), persistent=False)
        self.register_buffer("is_total", torch.from_numpy(features.IS_TOTAL), persistent=False)
        is_count = torch.arange(features.WIDTH["globals"]) == features.COUNT
        self.register_buffer("is_count", is_count, persistent=False)

    def forward(self, name: str, values: Tensor) -> Tensor:
        """Scale [..., WIDTH[name]] of one array of the observation."""
        scaled = values / self.get_buffer(f"{name}_scale")
        return torch.where(self.get_buffer(f"{name}_is_log"), torch.log1p(scaled), scaled)

    def context(self, globals_: Tensor, history: Tensor) -> Tensor:
        """Globals and history, per instance and scaled, [B, GLOBAL + HISTORY]."""
        count = globals_[:, features.COUNT, None].clamp(min=1.0)
        shared = torch.where(self.get_buffer("is_total"), globals_ / count, globals_)
        inverse = self.get_buffer("globals_scale")[features.COUNT] ** 2 / count
        shared = torch.where(self.get_buffer("is_count"), inverse, shared)
        return torch.cat([self("globals", shared), self("history", history / count)], dim=1)


class Block(nn.Module):
    """Parameters of one round of message passing."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.message_instance = nn.Linear(hidden, hidden, bias=False)
        self.message_request = nn.Linear(hidden, hidden, bias=False)
        self.message_edge = nn.Linear(features.WIDTH["edges"], hidden)
        self.pool = nn.Linear(2 * hidden, hidden)
        self.instance_message = nn.Linear(hidden, hidden)
        self.instance_context = nn.Linear(hidden, hidden, bias=False)
        self.request_message = nn.Linear(hidden, hidden)
        self.request_context = nn.Linear(hidden, hidden, bias=False)


class GraphParameters(nn.Module):
    """All parameters of the network; subclasses say how they are applied.

    Args:
        config: width and depth.
        seed: of the orthogonal initialisation (gain sqrt 2; 0.01 for the scores, so that a fresh policy is
            near uniform; 1 for the value), as PPO implementations do (arXiv 2005.12729).
    """

    def __init__(self, config: NetworkConfig | None = None, seed: int = 0) -> None:
        super().__init__()
        self.config = config = config or NetworkConfig()
        hidden, width = config.hidden, features.WIDTH
        self.scaling = Scaling()
        self.instance_in = nn.Linear(width["instances"], hidden)
        self.request_in = nn.Linear(width["requests"], hidden)
        self.context_in = nn.Linear(width["globals"] + width["history"], hidden)
        self.kind = nn.Embedding(len(schema.KINDS), hidden)
        blocks = nn.ModuleList(Block(hidden) for _ in range(config.layers))
        self.blocks = cast("Iterable[Block]", blocks)  # ModuleList does not say of what
        self.head_instance = nn.Linear(hidden, hidden, bias=False)
        self.head_request = nn.Linear(hidden, hidden, bias=False)
        self.head_context = nn.Linear(hidden, hidden, bias=False)
        self.head_edge = nn.Linear(width["edges"], hidden)
        self.head_score = nn.Linear(hidden, 1, bias=False)
        self.value_hidden = nn.Linear(3 * hidden, hidden)
        self.value_out = nn.Linear(hidden, 1)
        self._initialise(seed)

    def _initialise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        gains = {"head_score": 0.01, "value_out": 1.0, "kind": 0.1}
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.orthogonal_(parameter, gains.get(name.split(".")[0], 2**0.5), generator=generator)
