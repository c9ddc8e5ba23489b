"""The network's parameters and its memory as the kernels of `servegym.models.inlane` take them.

Weights are stored [in, out], so that the outputs, over which the kernels' vectors run, are contiguous.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from servegym.envs.cluster import schema
from servegym.envs.cluster.address import by_address
from servegym.models.features import IS_LOG, SCALE, WIDTH
from servegym.models.simd import ROWS
from servegym.models.simd import WIDTH as COLUMNS

_CONTEXT = WIDTH["globals"] + WIDTH["history"]


@by_address
class Weights(NamedTuple):
    """The network's parameters as float32 arrays [in, out], padded with zeros to P = H rounded up to 16.

    The head counts as one more block for what it shares with them, so that L + 1 = blocks + head.
    `context_bias` is that of `context_in` plus the embedding of each kind.
    """

    instance_in: np.ndarray  # [INSTANCE, P]
    instance_bias: np.ndarray  # [P]
    request_in: np.ndarray  # [REQUEST, P]
    request_bias: np.ndarray  # [P]
    context_in: np.ndarray  # [GLOBAL + HISTORY, rounded up to 4, P]
    context_bias: np.ndarray  # [K, P]
    edge_in: np.ndarray  # [EDGE, (L + 1) P]
    edge_bias: np.ndarray  # [(L + 1) P]
    message_instance: np.ndarray  # [L + 1, P, P]
    message_request: np.ndarray  # [L + 1, P, P]
    pool: np.ndarray  # [L, 2 P, P]
    pool_bias: np.ndarray  # [L, P]
    instance_message: np.ndarray  # [L, P, P]
    request_message: np.ndarray  # [L, P, P]
    update_context: np.ndarray  # [L, P, 2 P]; of instances, then of requests
    update_bias: np.ndarray  # [L, 2 P]
    head_context: np.ndarray  # [P, P]
    head_score: np.ndarray  # [P]
    value_hidden: np.ndarray  # [3 P, P]
    value_bias: np.ndarray  # [P]
    value_out: np.ndarray  # [P]
    value_out_bias: np.ndarray  # [1]


@by_address
class Scratch(NamedTuple):
    """Memory between the layers, float32 unless said otherwise; rows are rounded up to 4."""

    instance_factor: np.ndarray  # [I * INSTANCE]; 1 / scale of each number of a frame's row
    instance_log: np.ndarray  # bool [I * INSTANCE]
    request_factor: np.ndarray  # [R * REQUEST]
    request_log: np.ndarray  # bool [R * REQUEST]
    edge_factor: np.ndarray  # [C * EDGE]
    edge_log: np.ndarray  # bool [C * EDGE]
    context_factor: np.ndarray  # [GLOBAL + HISTORY]
    context_log: np.ndarray  # bool [GLOBAL + HISTORY]
    instances: np.ndarray  # [I, INSTANCE], scaled
    requests: np.ndarray  # [R, REQUEST], scaled
    edges: np.ndarray  # [C, EDGE], scaled
    context: np.ndarray  # [1, GLOBAL + HISTORY rounded up], scaled
    x: np.ndarray  # [I, P]
    q: np.ndarray  # [R, P]
    pooled: np.ndarray  # [1, 3 P]: g, mean of x, maximum of x
    from_edge: np.ndarray  # [C, (L + 1) P]
    from_instance: np.ndarray  # [I, P]
    from_request: np.ndarray  # [R, P]
    to_instance: np.ndarray  # [I, P]
    to_request: np.ndarray  # [R, P]
    update: np.ndarray  # [1, 2 P]
    hidden: np.ndarray  # [1, P]
    instance_share: np.ndarray  # [I]: 1 / legal candidates of the row, 0 without any
    request_share: np.ndarray  # [R]
    real: np.ndarray  # [I]: 1 for instances of the cluster
    legal: np.ndarray  # int64 [C]: numbers of the legal candidates
    logits: np.ndarray  # [C]


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


def make_weights(hidden: int, layers: int) -> Weights:
    """Zeroed weights of a network of that size, for `load_weights`."""
    p = _up(hidden, COLUMNS)
    shapes = {
        "instance_in": (WIDTH["instances"], p),
        "request_in": (WIDTH["requests"], p),
        "context_in": (_up(_CONTEXT, ROWS), p),
        "context_bias": (len(schema.KINDS), p),
        "edge_in": (WIDTH["edges"], (layers + 1) * p),
        "edge_bias": ((layers + 1) * p,),
        "message_instance": (layers + 1, p, p),
        "message_request": (layers + 1, p, p),
        "pool": (layers, 2 * p, p),
        "pool_bias": (layers, p),
        "instance_message": (layers, p, p),
        "request_message": (layers, p, p),
        "update_context": (layers, p, 2 * p),
        "update_bias": (layers, 2 * p),
        "head_context": (p, p),
        "value_hidden": (3 * p, p),
        "value_out_bias": (1,),
    }
    return Weights(**{name: np.zeros(shapes.get(name, (p,)), np.float32) for name in Weights._fields})


def load_weights(packed: Weights, weights: Mapping[str, np.ndarray]) -> None:
    """Put the tensors of `policy.safetensors`, named as in `servegym.models.layers`, into `packed`."""
    h = weights["instance_in.weight"].shape[0]
    p, layers = packed.head_score.shape[0], packed.pool.shape[0]

    def put(target: np.ndarray, name: str) -> None:
        """A weight [out, in] or a bias, its inputs and outputs in the padding's first places."""
        source = weights[name].T
        target[tuple(slice(size) for size in source.shape)] = source

    for name in ("instance", "request", "context"):
        put(getattr(packed, f"{name}_in"), f"{name}_in.weight")
    for name in ("instance", "request"):
        put(getattr(packed, f"{name}_bias"), f"{name}_in.bias")
    packed.context_bias[:, :h] = weights["kind.weight"] + weights["context_in.bias"]
    for block in range(layers + 1):
        part, at = slice(block * p, block * p + p), f"blocks.{block}.message"
        name = at if block < layers else "head"
        put(packed.message_instance[block], f"{name}_instance.weight")
        put(packed.message_request[block], f"{name}_request.weight")
        put(packed.edge_in[:, part], f"{name}_edge.weight")
        put(packed.edge_bias[part], f"{name}_edge.bias")
    for block in range(layers):
        name = f"blocks.{block}"
        pool = weights[f"{name}.pool.weight"]
        for k in range(2):
            packed.pool[block, k * p : k * p + h, :h] = pool[:, k * h : k * h + h].T
        put(packed.pool_bias[block], f"{name}.pool.bias")
        for k, kind in enumerate(("instance", "request")):
            put(getattr(packed, f"{kind}_message")[block], f"{name}.{kind}_message.weight")
            put(packed.update_context[block][:, k * p :], f"{name}.{kind}_context.weight")
            put(packed.update_bias[block, k * p :], f"{name}.{kind}_message.bias")
    put(packed.head_context, "head_context.weight")
    for k in range(3):
        packed.value_hidden[k * p : k * p + h, :h] = weights["value_hidden.weight"][:, k * h : k * h + h].T
    put(packed.value_bias, "value_hidden.bias")
    packed.head_score[:h] = weights["head_score.weight"][0]
    packed.value_out[:h] = weights["value_out.weight"][0]
    packed.value_out_bias[:] = weights["value_out.bias"]


def make_scratch(weights: Weights, instances: int, requests: int, candidates: int) -> Scratch:
    """Memory for frames of so many instance rows I, request rows R and candidates C; one a thread."""
    p, joins = weights.head_score.shape[0], weights.message_instance.shape[0]
    rows = {"instances": instances, "requests": requests, "edges": candidates}
    i, c = _up(instances, ROWS), _up(candidates, ROWS)
    r = 1 if requests == 1 else _up(requests, ROWS)

    def tiled(table: dict[str, np.ndarray], name: str) -> np.ndarray:
        return np.ascontiguousarray(np.tile(table[name], rows[name]))

    factor = {name: (1.0 / scale).astype(np.float32) for name, scale in SCALE.items()}
    context = ("globals", "history")
    shapes = {
        "instances": (i, WIDTH["instances"]),
        "requests": (r, WIDTH["requests"]),
        "edges": (c, WIDTH["edges"]),
        "context": (1, weights.context_in.shape[0]),
        "x": (i, p),
        "q": (r, p),
        "pooled": (1, 3 * p),
        "from_edge": (c, joins * p),
        "from_instance": (i, p),
        "from_request": (r, p),
        "to_instance": (i, p),
        "to_request": (r, p),
        "update": (1, 2 * p),
        "hidden": (1, p),
        "instance_share": (i,),
        "request_share": (r,),
        "real": (i,),
        "logits": (candidates,),
    }
    return Scratch(
        instance_factor=tiled(factor, "instances"),
        instance_log=tiled(IS_LOG, "instances"),
        request_factor=tiled(factor, "requests"),
        request_log=tiled(IS_LOG, "requests"),
        edge_factor=tiled(factor, "edges"),
        edge_log=tiled(IS_LOG, "edges"),
        context_factor=np.concatenate([factor[name] for name in context]),
        context_log=np.concatenate([IS_LOG[name] for name in context]),
        legal=np.zeros(c, np.int64),
        **{name: np.zeros(shape, np.float32) for name, shape in shapes.items()},
    )
