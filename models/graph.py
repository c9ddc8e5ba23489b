"""The graph form of the network in PyTorch Geometric: the reference that the dense form is tested against.

Here a cluster is a `HeteroData` with node types `instance` and `request` and one edge type, `candidate`,
and a batch is a disjoint union of clusters of any sizes, without padding.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import relu
from torch_geometric.data import Batch, HeteroData
from torch_geometric.nn import MessagePassing, global_max_pool, global_mean_pool

from servegym.models.layers import GraphParameters

CANDIDATE = ("request", "candidate", "instance")


def to_graph(obs: Mapping[str, np.ndarray]) -> HeteroData:
    """One lane's observation as a graph, its padding removed.

    Args:
        obs: the arrays of `servegym.envs.cluster.schema`, without a lane dimension.

    Returns:
        `instance.x`, `request.x`, and for each legal candidate its `edge_index`, raw `edge_attr` and
        `answer`, its number in the observation; on the graph `globals`, `history` and `kind`.
    """
    real, legal = np.flatnonzero(obs["instance_mask"]), np.flatnonzero(obs["mask"])
    renumbered = np.cumsum(obs["instance_mask"], dtype=np.int64) - 1
    ends = obs["candidates"][legal]
    data = HeteroData()
    data["instance"].x = torch.from_numpy(obs["instances"][real])
    data["request"].x = torch.from_numpy(obs["requests"])
    data[CANDIDATE].edge_index = torch.from_numpy(
        np.stack([ends[:, 0].astype(np.int64), renumbered[ends[:, 1]]])
    )
    data[CANDIDATE].edge_attr = torch.from_numpy(obs["edges"][legal])
    data[CANDIDATE].answer = torch.from_numpy(legal)
    data.globals = torch.from_numpy(obs["globals"][None])
    data.history = torch.from_numpy(obs["history"][None])
    data.kind = torch.from_numpy(np.atleast_1d(obs["kind"]))
    return data


def to_batch(obs: Mapping[str, np.ndarray]) -> Batch:
    """A batch of observations, leading dimension B, as one disjoint graph."""
    lanes = len(obs["kind"])
    return Batch.from_data_list(
        [to_graph({name: rows[lane] for name, rows in obs.items()}) for lane in range(lanes)]
    )


class CandidateConv(MessagePassing):
    """Mean over a node's candidates of relu(sender + receiver + edge), all of them projected before."""

    def __init__(self) -> None:
        super().__init__(aggr="mean")

    def forward(self, sender: Tensor, receiver: Tensor, edge: Tensor, edge_index: Tensor) -> Tensor:
        """Messages [N_receiver, H] along `edge_index` [2, E], whose rows are sender and receiver."""
        size = (len(sender), len(receiver))
        return self.propagate(edge_index, x=(sender, receiver), edge=edge, size=size)

    def message(self, x_j: Tensor, x_i: Tensor, edge: Tensor) -> Tensor:
        """One message per candidate, [E, H]."""
        return relu(x_j + x_i + edge)


class GraphNetwork(GraphParameters):
    """The same function as `servegym.models.dense.DenseNetwork`, with the same `state_dict`."""

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Score the candidates and value the clusters.

        Args:
            batch: B graphs, as `to_batch` makes them.

        Returns:
            logits [E], one for each legal candidate in the order of the graph's edges, and values [B].
        """
        edge_index, conv = batch[CANDIDATE].edge_index, CandidateConv()
        instance_of, request_of = batch["instance"].batch, batch["request"].batch
        edges = self.scaling("edges", batch[CANDIDATE].edge_attr)
        x = relu(self.instance_in(self.scaling("instances", batch["instance"].x)))
        q = relu(self.request_in(self.scaling("requests", batch["request"].x)))
        g = relu(self.context_in(self.scaling.context(batch.globals, batch.history)) + self.kind(batch.kind))

        for block in self.blocks:
            sent = block.message_request(q), block.message_instance(x), block.message_edge(edges)
            to_instance = conv(sent[0], sent[1], sent[2], edge_index)
            to_request = conv(sent[1], sent[0], sent[2], edge_index.flip(0))
            g = relu(g + block.pool(_pool(x, instance_of, batch.num_graphs)))
            x = relu(x + block.instance_message(to_instance) + block.instance_context(g)[instance_of])
            q = relu(q + block.request_message(to_request) + block.request_context(g)[request_of])

        request, instance = edge_index
        score = self.head_request(q)[request] + self.head_instance(x)[instance] + self.head_edge(edges)
        logits = self.head_score(relu(score + self.head_context(g)[request_of[request]])).squeeze(-1)
        pooled = torch.cat([g, _pool(x, instance_of, batch.num_graphs)], dim=1)
        return logits, self.value_out(relu(self.value_hidden(pooled))).squeeze(-1)


def _pool(x: Tensor, graph_of: Tensor, graphs: int) -> Tensor:
    return torch.cat([global_mean_pool(x, graph_of, graphs), global_max_pool(x, graph_of, graphs)], dim=1)
