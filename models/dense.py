"""The dense, padded form of the network: the fast path of roll-outs, updates and export."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import relu

from servegym.models.features import ILLEGAL
from servegym.models.layers import GraphParameters


class DenseNetwork(GraphParameters):
    """Graph network over padded batches; any number of lanes, instances, requests and candidates.

    Padding is exact: rows outside `instance_mask` and candidates outside `mask` change no output.
    """

    def forward(self, obs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Score the candidates and value the cluster.

        Args:
            obs: the arrays of `servegym.envs.cluster.schema` as tensors with a leading lane dimension B, in
                natural units.

        Returns:
            logits [B, C], `ILLEGAL` where `mask` is 0, so that their log_softmax is finite, and values [B] in
            the units of the trainer's normaliser.
        """
        real = obs["instance_mask"].to(torch.float32)[..., None]
        legal = obs["mask"].to(torch.float32)[..., None]
        edges = self.scaling("edges", obs["edges"])
        x = relu(self.instance_in(self.scaling("instances", obs["instances"]))) * real
        q = relu(self.request_in(self.scaling("requests", obs["requests"])))
        g = relu(
            self.context_in(self.scaling.context(obs["globals"], obs["history"])) + self.kind(obs["kind"])
        )
        to_instance = _Join(obs["candidates"][..., 1], legal, x.shape[1])
        to_request = _Join(obs["candidates"][..., 0], legal, q.shape[1])

        for block in self.blocks:
            message = to_instance.gather(block.message_instance(x)) + to_request.gather(
                block.message_request(q)
            )
            message = relu(message + block.message_edge(edges)) * legal
            g = relu(g + block.pool(_pool(x, real)))
            update = block.instance_message(to_instance.mean(message))
            x = relu(x + update + block.instance_context(g)[:, None]) * real
            update = block.request_message(to_request.mean(message))
            q = relu(q + update + block.request_context(g)[:, None])

        score = to_instance.gather(self.head_instance(x)) + to_request.gather(self.head_request(q))
        score = relu(score + self.head_edge(edges) + self.head_context(g)[:, None])
        logits = self.head_score(score).squeeze(-1).masked_fill(obs["mask"] == 0, ILLEGAL)
        value = self.value_out(relu(self.value_hidden(torch.cat([g, _pool(x, real)], dim=1)))).squeeze(-1)
        return logits, value


class _Join:
    """The end of each candidate on one side of the graph; rows of all lanes lie behind each other.

    Args:
        rows: int32 [B, C], the row that each candidate joins.
        legal: float32 [B, C, 1].
        size: rows of a lane; one row, as in dispatch, needs no indexing.
    """

    def __init__(self, rows: Tensor, legal: Tensor, size: int) -> None:
        self.shape = (rows.shape[0], size)
        lane = torch.arange(rows.shape[0], dtype=rows.dtype, device=rows.device)
        self.index = (rows + lane[:, None] * size).flatten()
        self.share = 1.0 / self._sum(legal).clamp(min=1.0)

    def gather(self, rows: Tensor) -> Tensor:
        """[B, size, H] -> the row of each candidate, [B, C, H] or, of a single row, [B, 1, H]."""
        if self.shape[1] == 1:
            return rows
        return rows.flatten(0, 1).index_select(0, self.index).unflatten(0, (rows.shape[0], -1))

    def mean(self, messages: Tensor) -> Tensor:
        """[B, C, H] -> [B, size, H]: mean over the legal candidates of each row, 0 without any."""
        return self._sum(messages) * self.share

    def _sum(self, messages: Tensor) -> Tensor:
        if self.shape[1] == 1:
            return messages.sum(1, keepdim=True)
        batch, size = self.shape
        total = messages.new_zeros(batch * size, messages.shape[-1])
        return total.index_add(0, self.index, messages.flatten(0, 1)).unflatten(0, (batch, size))


def _pool(x: Tensor, real: Tensor) -> Tensor:
    """Mean and maximum over real instances, [B, 2 H]; rows that are not real hold zeros and x >= 0."""
    return torch.cat([x.sum(1) / real.sum(1).clamp(min=1.0), x.amax(1)], dim=1)
