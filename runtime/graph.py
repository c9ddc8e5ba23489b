"""The network as a lean ONNX graph of one observation, written node by node.

The same function as `servegym.models.numpy_policy.forward`, arranged so that it takes few nodes: at these
sizes a node costs more than its arithmetic. H is the width, I and R the rows of instances and requests.

- One matrix Y [R + I, 2 H] holds all rows, requests first: q in the last H columns of theirs, x in the first
  H of the instances', 0 elsewhere. Weights of both stand behind each other, so that one product serves both.
- S [C, R + I] has a 1 where a legal candidate joins a row. S (Y W) is what its rows send each candidate; the
  transpose of S, with its columns divided by their sums, takes means over the candidates of a row.
- K [R + I, 3] tells rows of requests, instances and padding apart. K P + Y, where P is far below 0 in the
  columns that a row does not use, leaves 0 there behind the relu.
- log1p(x / s) = log(x + s) - log(s), the second part in the bias. Of a `linear` feature the logarithm gets
  weight 0; a large s keeps it finite.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from servegym.models.features import COUNT, ILLEGAL, IS_LOG, IS_TOTAL, SCALE, WIDTH
from servegym.models.numpy_policy import depth

OPSET = 18
_FAR = 1e30  # added to linear features, so that their unused logarithm is finite
_NOWHERE = 1 << 20  # added to the number of an instance that a candidate shall not join
_PADDING, _INSTANCE, _REQUEST = range(3)  # columns of K

Arrays = Mapping[str, np.ndarray]


def build_graph(weights: Arrays, requests: int) -> onnx.ModelProto:
    """The graph of a network, from the arrays of one observation to its logits [C, 1].

    `servegym.runtime.bundle` says how it reads them. Numbers of instances and candidates may vary.

    Args:
        weights: the tensors of `policy.safetensors`.
        requests: request rows R of the observations.
    """
    return _Builder(weights, requests).build()


class _Graph:
    """Collects nodes and constants; what is added is known by the name that comes back."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, values: object, dtype: type = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(values, dtype, order="C"), name))
        return name

    def add(self, op: str, *inputs: str, parts: int | None = None, **attributes: Any) -> str:
        """Add a node; one that has several outputs names these NAME.0, NAME.1, ..."""
        name = f"v{len(self.nodes)}"
        names = [name] if parts is None else [f"{name}.{k}" for k in range(parts)]
        self.nodes.append(helper.make_node(op, inputs, names, name, **attributes))
        return name

    def product(self, rows: str, weights: np.ndarray, more: str = "") -> str:
        """The matrix `rows` times weights [in, out], plus `more`."""
        return self.add("Gemm", rows, self.constant(weights), *([more] if more else []))

    def relu(self, rows: str) -> str:
        return self.add("Relu", rows)


class _Builder:
    """Writes the graph of one network for R request rows."""

    def __init__(self, weights: Arrays, requests: int) -> None:
        self.w, self.r = weights, requests
        self.h = weights["instance_in.weight"].shape[0]
        self.graph = _Graph()

    def build(self) -> onnx.ModelProto:
        """The whole graph."""
        g = self.graph
        self._write_rows()
        self._write_joins()
        request, instance = (self._embed(f"{kind}s", f"{kind}_in") for kind in ("request", "instance"))
        y = self._keep(g.constant(self._unused()), g.add("Concat", request, instance, axis=0))
        edges, context = self._edges(), self._context()
        for block, edge in enumerate(edges[:-1]):
            y, context = self._block(f"blocks.{block}.", y, context, edge)
        # A legal candidate joins two rows, each of which sends half of what the cluster adds to its score.
        shared = g.product(context, self.w["head_context.weight"].T / 2)
        score = self._gather(y, "head_", edges[-1], shared)
        g.product(score, self.w["head_score.weight"].T, self.illegal)
        g.nodes[-1].output[0] = "logits"
        return self._model()

    def _both(self, name: str, axis: int) -> np.ndarray:
        """Parameters of instances, then of requests; `{}` stands for the kind."""
        parts = [self.w[name.format(kind)].T for kind in ("instance", "request")]
        return np.concatenate(parts, axis)

    # --- inputs -------------------------------------------------------------------------------------------

    def _logged(self, table: str) -> str:
        """Logarithms of a table's features, then the features as they are."""
        g = self.graph
        shift = np.where(IS_LOG[table], SCALE[table], np.float32(_FAR))
        return g.add("Concat", g.add("Log", g.add("Add", table, g.constant(shift))), table, axis=1)

    def _layer(self, table: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Weights and bias that make of `_logged` features what the layer `name` makes of scaled ones."""
        weight = self.w[f"{name}.weight"].T.astype(np.float64)
        is_log, scale = IS_LOG[table], SCALE[table].astype(np.float64)
        bias = self.w[f"{name}.bias"] - (is_log * np.log(scale)) @ weight
        return np.concatenate([weight * is_log[:, None], weight * (~is_log / scale)[:, None]]), bias

    def _embed(self, table: str, name: str) -> str:
        """Rows of Y before the relu."""
        half = slice(0, self.h) if table == "instances" else slice(self.h, None)
        weight, bias = (np.zeros((*part.shape[:-1], 2 * self.h)) for part in self._layer(table, name))
        weight[:, half], bias[half] = self._layer(table, name)
        return self.graph.product(self._logged(table), weight, self.graph.constant(bias))

    def _edges(self) -> list[str]:
        """What the edge adds to each candidate's message in every block, and to its score."""
        names = [*(f"blocks.{k}.message_edge" for k in range(depth(self.w))), "head_edge"]
        weight, bias = (
            np.concatenate(p, -1) for p in zip(*(self._layer("edges", n) for n in names), strict=True)
        )
        every = self.graph.product(self._logged("edges"), weight, self.graph.constant(bias))
        sizes = self.graph.constant([self.h] * len(names), np.int64)
        split = self.graph.add("Split", every, sizes, parts=len(names), axis=1)
        return [f"{split}.{k}" for k in range(len(names))]

    def _context(self) -> str:
        """Embed the cluster: g before the first block.

        With n instances, a total becomes log1p(x / (n s)) = log(x + n s) - log n - log s, and n itself
        log1p(s / n) = log(n + s) - log n. One product adds n s, and appends n.
        """
        g, size = self.graph, WIDTH["globals"] + WIDTH["history"]
        scale = np.concatenate([SCALE["globals"], SCALE["history"]]).astype(np.float64)
        is_total = np.concatenate([IS_TOTAL, np.ones(WIDTH["history"], bool)])
        is_count = np.arange(size) == COUNT
        spread = np.eye(size, size + 1)
        spread[COUNT, :size] += is_total * scale
        spread[COUNT, size] = 1.0
        shift = np.append(np.where(is_total, 0.0, scale), 0.0)
        values = g.add("Concat", "globals", "history", axis=1)
        logs = g.add("Log", g.product(values, spread, g.constant(shift)))
        weight = self.w["context_in.weight"].T.astype(np.float64)
        weights = np.concatenate([weight, -((is_total | is_count) @ weight)[None]])
        bias = self.w["context_in.bias"] - (np.log(scale) * ~is_count) @ weight
        kind = g.add("Gather", g.constant(self.w["kind.weight"] + bias), "kind", axis=0)
        return g.relu(g.product(logs, weights, kind))

    # --- who is joined to whom ----------------------------------------------------------------------------

    def _write_rows(self) -> None:
        """K, and the share of each row in the mean instance."""
        g = self.graph
        rows = g.add("Pad", "instance_mask", g.constant([self.r, 0], np.int64), g.constant(_REQUEST, np.int8))
        rows = g.add("Cast", rows, to=TensorProto.INT32)
        self.kinds = g.add("Gather", g.constant(np.eye(3)), rows, axis=0)
        real = g.add("Gather", g.constant(np.eye(3)[[_INSTANCE]]), rows, axis=1)
        self.share = g.add("LpNormalization", real, axis=1, p=1)

    def _write_joins(self) -> None:
        """S, the means over it, and what forbids illegal candidates.

        Candidates are (request, instance, source); the source joins nothing, illegal ones nothing at all.
        """
        g, r = self.graph, self.r
        mask = g.add("Cast", "mask", to=TensorProto.INT32)
        self.illegal = g.add("Gather", g.constant([[2 * ILLEGAL], [0.0]]), mask, axis=0)
        moved = g.add("Gather", g.constant([[r, _NOWHERE, 0], [0, 0, 0]], np.int32), mask, axis=0)
        rows = g.add("Add", "candidates", moved)
        request, instance = (g.add("Gather", rows, g.constant(k, np.int64), axis=1) for k in range(2))
        size = g.add("Cast", g.add("Shape", "instances", end=1), to=TensorProto.INT32)
        hot = g.add("OneHot", instance, size, g.constant([0.0, 1.0]))
        known = g.constant(np.eye(2 * r, r))  # illegal candidates have rows from r on, of zeros
        self.joins = g.add("Concat", g.add("Gather", known, request, axis=0), hot, axis=1)
        self.means = g.add("LpNormalization", self.joins, axis=0, p=1)

    def _unused(self) -> np.ndarray:
        """P, [3, 2 H]."""
        unused = np.full((3, 2 * self.h), 2 * ILLEGAL)
        unused[_INSTANCE, : self.h] = unused[_REQUEST, self.h :] = 0.0
        return unused

    def _keep(self, unused: str, rows: str) -> str:
        """relu(K P + rows), with P by name."""
        return self.graph.relu(self.graph.add("Gemm", self.kinds, unused, rows))

    # --- message passing ----------------------------------------------------------------------------------

    def _gather(self, y: str, prefix: str, more: str, shared: str = "") -> str:
        """relu(what its rows send each candidate, twice `shared` included, + more), [C, H]."""
        sent = self.graph.product(y, self._both(f"{prefix}{{}}.weight", 0), shared)
        return self.graph.relu(self.graph.add("Gemm", self.joins, sent, more))

    def _block(self, name: str, y: str, context: str, edge: str) -> tuple[str, str]:
        """One round: the next Y and g."""
        g = self.graph
        message = self._gather(y, f"{name}message_", edge)
        context = self._pool(name, y, context)
        bias = g.constant(self._both(f"{name}{{}}_message.bias", 0))
        shared = g.product(context, self._both(f"{name}{{}}_context.weight", 1), bias)
        mean = g.add("Gemm", self.means, message, transA=1)
        update = g.product(mean, self._both(f"{name}{{}}_message.weight", 1), y)
        return self._keep(g.add("Add", shared, g.constant(self._unused())), update), context

    def _pool(self, name: str, y: str, context: str) -> str:
        """relu(g + pool [mean, maximum of x]); the halves of q have no weight."""
        g, h = self.graph, self.h
        mean = g.add("MatMul", self.share, y)
        most = g.add("ReduceMax", y, g.constant([0], np.int64), keepdims=1)
        weights = np.zeros((5 * h, h))
        weights[:h] = np.eye(h)
        weights[h : 2 * h], weights[3 * h : 4 * h] = np.split(self.w[f"{name}pool.weight"].T, 2)
        both = g.add("Concat", context, mean, most, axis=1)
        return g.relu(g.product(both, weights, g.constant(self.w[f"{name}pool.bias"])))

    def _model(self) -> onnx.ModelProto:
        shapes: dict[str, tuple[int, list[str | int]]] = {
            "instances": (TensorProto.FLOAT, ["instances", WIDTH["instances"]]),
            "requests": (TensorProto.FLOAT, [self.r, WIDTH["requests"]]),
            "candidates": (TensorProto.INT32, ["candidates", 3]),
            "edges": (TensorProto.FLOAT, ["candidates", WIDTH["edges"]]),
            "globals": (TensorProto.FLOAT, [1, WIDTH["globals"]]),
            "history": (TensorProto.FLOAT, [1, WIDTH["history"]]),
            "instance_mask": (TensorProto.INT8, ["instances"]),
            "mask": (TensorProto.INT8, ["candidates"]),
            "kind": (TensorProto.INT64, [1]),
        }
        inputs = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in shapes.items()]
        output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["candidates", 1])
        graph = helper.make_graph(self.graph.nodes, "policy", inputs, [output], self.graph.constants)
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model(graph, opset_imports=[opset], producer_name="servegym", ir_version=9)
        onnx.checker.check_model(model, full_check=True)
        return model
