"""The network as a lean ONNX graph of one question, written node by node.

The same function as `servegym.models.numpy_policy.forward`, arranged so that it takes few nodes: at these
sizes a node costs more than its arithmetic. `servegym.runtime.feed` makes what it reads of an observation,
scaled as `servegym.models.features` says:

    rows    [C, INSTANCE + EDGE + 1]  a legal candidate each: the instance that it joins, its edge, and 0;
                                      behind them each instance that none joins, without an edge, and 1
    asked   [R, REQUEST + GLOBAL + HISTORY + KINDS]  a request each, with the cluster and the kind of question
    means   [C, C]  shares of the candidates in the mean over those of each row's instance
    mine    [R, C]  shares of the candidates in the mean over those of each request
    pool    [R, C]  shares of the rows in the mean instance, alike in all rows
    asks    [C, R]  1 at the request that the candidate joins; not read where R is 1

and answers with logits [C, 1], of which those of candidates mean something. Two matrices hold what the
network knows; H is its width:

- X [C, H + EDGE + 2]: x of the row's instance, its edge, 1 where it has none, and 1. Candidates of the same
  instance hold the same x. All of it is >= 0, so that a relu changes nothing but x.
- u [R, 2 H]: q of the request, and g, alike in all rows.

The shares of each row of `means` and `mine` add up to 1, so that what stands in all rows of a matrix, as g
and 1 do in that of the messages, passes a mean unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from servegym.envs.cluster.schema import KINDS
from servegym.models.features import ILLEGAL, WIDTH
from servegym.models.numpy_policy import depth

OPSET = 18
ROW = WIDTH["instances"] + WIDTH["edges"] + 1
ASKED = WIDTH["requests"] + WIDTH["globals"] + WIDTH["history"] + len(KINDS)

Arrays = Mapping[str, np.ndarray]


def build_graph(weights: Arrays, requests: int) -> onnx.ModelProto:
    """The graph of a network; numbers of candidates, and of several requests, may vary.

    Args:
        weights: the tensors of `policy.safetensors`.
        requests: request rows of the observations that the network was trained on.
    """
    return _Builder(weights, requests == 1).build()


class _Graph:
    """Collects nodes and constants; what is added is known by the name that comes back."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, values: object, dtype: type = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(values, dtype, order="C"), name))
        return name

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name, **attributes))
        return name

    def product(self, rows: str, by: np.ndarray | str, more: str = "") -> str:
        """The matrix `rows` times another, [in, out], plus `more`."""
        other = by if isinstance(by, str) else self.constant(by)
        return self.add("Gemm", rows, other, *([more] if more else []))

    def relu(self, rows: str, by: np.ndarray | str, more: str = "") -> str:
        """The same without what is below 0."""
        return self.add("Relu", self.product(rows, by, more))


class _Builder:
    """Writes the graph of one network, for questions about one request or about several."""

    def __init__(self, weights: Arrays, is_single: bool) -> None:
        self.w, self.is_single = weights, is_single
        self.h = h = weights["instance_in.weight"].shape[0]
        self.edge = slice(h, h + WIDTH["edges"])  # columns of X
        self.alone, self.one = self.edge.stop, self.edge.stop + 1
        self.graph = _Graph()

    def build(self) -> onnx.ModelProto:
        """The whole graph."""
        g = self.graph
        x, u = self._embed()
        for k in range(depth(self.w)):
            x, u = self._block(f"blocks.{k}.", x, u)
        both = np.concatenate([self._of("head_request"), self._of("head_context")])
        score = g.relu(x, self._joined("head_instance", "head_edge"), self._spread(g.product(u, both)))
        g.product(score, self._of("head_score"))
        g.nodes[-1].output[0] = "logits"
        return self._model()

    def _of(self, name: str) -> np.ndarray:
        """Weights [in, out]."""
        return self.w[f"{name}.weight"].T

    def _joined(self, instance: str, edge: str) -> np.ndarray:
        """What an X's instance and edge send to a candidate, [columns of X, H]."""
        weights = np.zeros((self.one + 1, self.h))
        weights[: self.h], weights[self.edge] = self._of(instance), self._of(edge)
        weights[self.one] = self.w[f"{edge}.bias"]
        return weights

    def _spread(self, rows: str) -> str:
        """Rows of requests -> what each candidate gets of them; a single row is added to all as it is."""
        return rows if self.is_single else self.graph.product("asks", rows)

    def _embed(self) -> tuple[str, str]:
        """X and u from the inputs."""
        g, h, w = self.graph, self.h, self.w
        n = WIDTH["instances"]
        row, row_bias = np.zeros((ROW, self.one + 1)), np.zeros(self.one + 1)
        row[:n, :h], row_bias[:h] = self._of("instance_in"), w["instance_in.bias"]
        row[n:, h : self.one], row_bias[self.one] = np.eye(WIDTH["edges"] + 1), 1.0
        n = WIDTH["requests"]
        asked = np.zeros((ASKED, 2 * h))
        asked[:n, :h] = self._of("request_in")
        asked[n:, h:] = np.concatenate([self._of("context_in"), w["kind.weight"]])
        asked_bias = np.concatenate([w["request_in.bias"], w["context_in.bias"]])
        x = g.relu("rows", row, g.constant(row_bias))
        return x, g.relu("asked", asked, g.constant(asked_bias))

    def _block(self, name: str, x: str, u: str) -> tuple[str, str]:
        """One round: the next X and u."""
        g, h = self.graph, self.h
        u = self._pool(name, x, u)
        # Messages [C, 2 H + 1]: m, g, and 1. Rows without an edge send nothing.
        sent = np.zeros((2 * h, 2 * h + 1))
        sent[:h, :h], sent[h:, h : 2 * h] = self._of(f"{name}message_request"), np.eye(h)
        joined = np.zeros((self.one + 1, 2 * h + 1))
        joined[:, :h] = self._joined(f"{name}message_instance", f"{name}message_edge")
        joined[self.alone, :h], joined[self.one, 2 * h] = ILLEGAL, 1.0
        messages = g.relu(x, joined, self._spread(g.product(u, sent)))
        u = g.relu(g.product("mine", messages), self._update(f"{name}request", 2 * h), u)
        updates = g.product(messages, self._update(f"{name}instance", self.one + 1))
        return g.relu("means", updates, x), u

    def _update(self, kind: str, columns: int) -> np.ndarray:
        """From messages to the first H columns of X or u."""
        weights = np.zeros((2 * self.h + 1, columns))
        weights[:, : self.h] = np.concatenate(
            [self._of(f"{kind}_message"), self._of(f"{kind}_context"), self.w[f"{kind}_message.bias"][None]]
        )
        return weights

    def _pool(self, name: str, x: str, u: str) -> str:
        """Put the next g into u: relu(g + pool [mean, maximum of x])."""
        g, h = self.graph, self.h
        mean, most = np.zeros((2, self.one + 1, 2 * h))
        mean[:h, h:], most[:h, h:] = np.split(self._of(f"{name}pool"), 2)
        mean[self.one, h:] = self.w[f"{name}pool.bias"]
        maximum = g.add("ReduceMax", x, g.constant([0], np.int64), keepdims=1)
        more = g.product(maximum, most, u) if self.is_single else g.add("Add", g.product(maximum, most), u)
        return g.relu(g.product("pool", x), mean, more)

    def _model(self) -> onnx.ModelProto:
        requests: str | int = 1 if self.is_single else "requests"
        shapes: dict[str, list[str | int]] = {
            "rows": ["candidates", ROW],
            "asked": [requests, ASKED],
            "means": ["candidates", "candidates"],
            "mine": [requests, "candidates"],
            "pool": [requests, "candidates"],
            "asks": ["candidates", requests],
        }
        read = {name for node in self.graph.nodes for name in node.input}
        tensors = {name: shape for name, shape in shapes.items() if name in read}
        inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in tensors.items()]
        output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["candidates", 1])
        graph = helper.make_graph(self.graph.nodes, "policy", inputs, [output], self.graph.constants)
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model(graph, opset_imports=[opset], producer_name="servegym", ir_version=9)
        onnx.checker.check_model(model, full_check=True)
        return model
