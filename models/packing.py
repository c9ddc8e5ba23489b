"""The network's parameters and its memory as the kernels of `servegym.models.inlane` take them.

Weights are stored [in, out], so that the outputs, over which the kernels' vectors run, are contiguous.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    """The network's parameters as float32 arrays [in, out], padded with zeros to P.

    P is H rounded up to whole vectors. The head counts as one more block for what it shares with them:
    L + 1 = blocks + head. `context_bias` is that of `context_in` plus the embedding of each kind.
    """

    instance_in: np.ndarray  # [INSTANCE, P]
    instance_bias: np.ndarray  # [P]
    request_in: np.ndarray  # [REQUEST, P]
    request_bias: np.ndarray  # [P]
    context_in: np.ndarray  # [GLOBAL + HISTORY, rounded up to 4, P]
    context_bias: np.ndarray  # [K, P]
    edge_in: np.ndarray  # [EDGE rounded up to 4, (L + 1) P]
    edge_bias: np.ndarray  # [1, (L + 1) P]
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
    value_context: np.ndarray  # [P, P]
    value_pooled: np.ndarray  # [2 P, P]
    value_bias: np.ndarray  # [P]
    value_out: np.ndarray  # [P]
    value_out_bias: np.ndarray  # [1]


@by_address
class Turned(NamedTuple):
    """The weights that gradients pass on their way back, [out, in]; made by `turn`."""

    message_instance: np.ndarray
    message_request: np.ndarray
    pool: np.ndarray
    instance_message: np.ndarray
    request_message: np.ndarray
    update_context: np.ndarray
    head_context: np.ndarray
    value_context: np.ndarray
    value_pooled: np.ndarray


@by_address
class Scratch(NamedTuple):
    """Memory between the layers, float32 unless said otherwise.

    Rows are rounded up to 4. What is scaled has room for a vector more, and constants for each number.
    """

    instances: np.ndarray  # [I, INSTANCE], scaled
    instances_factor: np.ndarray  # [I INSTANCE]: 1 / scale
    instances_log: np.ndarray  # [I INSTANCE]: 1 where log1p of that is taken
    requests: np.ndarray  # [R, REQUEST], and so on
    requests_factor: np.ndarray
    requests_log: np.ndarray
    edges: np.ndarray  # [C, EDGE]
    edges_factor: np.ndarray
    edges_log: np.ndarray
    context: np.ndarray  # [1, GLOBAL + HISTORY]
    context_factor: np.ndarray
    context_log: np.ndarray
    x: np.ndarray  # [L + 1, I, P]
    q: np.ndarray  # [L + 1, R, P]
    g: np.ndarray  # [L + 1, P]
    pooled: np.ndarray  # [L + 1, 2 P]: mean of x, maximum of x
    from_instance: np.ndarray  # [I, P]
    from_request: np.ndarray  # [R, P]
    from_edge: np.ndarray  # [C, (L + 1) P]
    message: np.ndarray  # [L, C, P]
    to_instance: np.ndarray  # [L, I, P]
    to_request: np.ndarray  # [L, R, P]
    update: np.ndarray  # [2 P]
    more: np.ndarray  # [1, P]
    score: np.ndarray  # [C, P]
    hidden: np.ndarray  # [P]
    nothing: np.ndarray  # [1, 2 P]: 0
    instance_share: np.ndarray  # [I]: 1 / legal candidates of the row, 0 without any
    request_share: np.ndarray  # [R]
    real: np.ndarray  # [I]: 1 for instances of the cluster
    real_share: np.ndarray  # [1]: 1 / real instances
    extent: np.ndarray  # int64 [3]: rows of instances and of requests in use, and legal candidates
    legal: np.ndarray  # int64 [C]: numbers of the legal candidates
    logits: np.ndarray  # [C]
    odds: np.ndarray  # float64 [C]; for who draws from the logits


@by_address
class Slopes(NamedTuple):
    """The loss's derivatives by what `Scratch` calls so, float32; `logits` is for the caller to fill."""

    logits: np.ndarray
    x: np.ndarray  # [I, P], of the layer at hand
    q: np.ndarray  # [R, P]
    g: np.ndarray  # [P]
    pooled: np.ndarray  # [2 P]
    from_instance: np.ndarray
    from_request: np.ndarray
    from_edge: np.ndarray
    to_instance: np.ndarray  # [I, P], of the block at hand
    to_request: np.ndarray  # [R, P]
    update: np.ndarray
    hidden: np.ndarray  # [1, P]


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
        "edge_in": (_up(WIDTH["edges"], ROWS), (layers + 1) * p),
        "edge_bias": (1, (layers + 1) * p),
        "message_instance": (layers + 1, p, p),
        "message_request": (layers + 1, p, p),
        "pool": (layers, 2 * p, p),
        "pool_bias": (layers, p),
        "instance_message": (layers, p, p),
        "request_message": (layers, p, p),
        "update_context": (layers, p, 2 * p),
        "update_bias": (layers, 2 * p),
        "head_context": (p, p),
        "value_context": (p, p),
        "value_pooled": (2 * p, p),
        "value_out_bias": (1,),
    }
    return Weights(**{name: np.zeros(shapes.get(name, (p,)), np.float32) for name in Weights._fields})


def _places(packed: Weights, h: int) -> Iterator[tuple[str, slice, np.ndarray]]:
    """Where the tensors of `policy.safetensors` lie, but for the two that `context_bias` adds.

    Yields:
        a tensor's name, columns of it, and the view of `packed` that holds them, as the tensor is laid out.
    """
    p, layers = packed.head_score.shape[0], packed.pool.shape[0]
    every = slice(None)

    def weight(name: str, place: np.ndarray, inputs: int = h) -> tuple[str, slice, np.ndarray]:
        return f"{name}.weight", every, place[:inputs, :h].T

    def bias(name: str, place: np.ndarray) -> tuple[str, slice, np.ndarray]:
        return f"{name}.bias", every, place[:h]

    def parts(name: str, place: np.ndarray, count: int, first: int = 0) -> Iterator[tuple]:
        """`count` groups of h input columns from the group `first` on, each behind padding to p."""
        for k in range(count):
            yield (
                f"{name}.weight",
                slice((first + k) * h, (first + k + 1) * h),
                place[k * p : k * p + h, :h].T,
            )

    yield weight("instance_in", packed.instance_in, WIDTH["instances"])
    yield bias("instance_in", packed.instance_bias)
    yield weight("request_in", packed.request_in, WIDTH["requests"])
    yield bias("request_in", packed.request_bias)
    yield weight("context_in", packed.context_in, _CONTEXT)
    for block in range(layers + 1):
        name = f"blocks.{block}.message" if block < layers else "head"
        part = slice(block * p, block * p + p)
        yield weight(f"{name}_instance", packed.message_instance[block])
        yield weight(f"{name}_request", packed.message_request[block])
        yield weight(f"{name}_edge", packed.edge_in[:, part], WIDTH["edges"])
        yield bias(f"{name}_edge", packed.edge_bias[0, part])
    for block in range(layers):
        name = f"blocks.{block}"
        yield from parts(f"{name}.pool", packed.pool[block], 2)
        yield bias(f"{name}.pool", packed.pool_bias[block])
        for k, kind in enumerate(("instance", "request")):
            yield weight(f"{name}.{kind}_message", getattr(packed, f"{kind}_message")[block])
            yield bias(f"{name}.{kind}_message", packed.update_bias[block, k * p :])
            yield weight(f"{name}.{kind}_context", packed.update_context[block][:, k * p :])
    yield weight("head_context", packed.head_context)
    yield "head_score.weight", every, packed.head_score[None, :h]
    yield from parts("value_hidden", packed.value_context, 1)
    yield from parts("value_hidden", packed.value_pooled, 2, first=1)
    yield bias("value_hidden", packed.value_bias)
    yield "value_out.weight", every, packed.value_out[None, :h]
    yield "value_out.bias", every, packed.value_out_bias


def load_weights(packed: Weights, weights: Mapping[str, np.ndarray]) -> None:
    """Put the tensors of `policy.safetensors`, named as in `servegym.models.layers`, into `packed`."""
    h = weights["instance_in.weight"].shape[0]
    for name, columns, place in _places(packed, h):
        place[...] = weights[name][..., columns]
    packed.context_bias[:, :h] = weights["kind.weight"] + weights["context_in.bias"]


def unload_gradient(packed: Weights, h: int) -> dict[str, np.ndarray]:
    """The gradient by each tensor, from the gradient by the packed weights of a network of width h."""
    pieces: dict[str, list[np.ndarray]] = {}
    for name, _, place in _places(packed, h):
        pieces.setdefault(name, []).append(place)
    kinds = packed.context_bias[:, :h]
    return {name: np.concatenate(columns, axis=-1) for name, columns in pieces.items()} | {
        "kind.weight": kinds.copy(),
        "context_in.bias": kinds.sum(0),
    }


def turn(packed: Weights) -> Turned:
    """Transpose what `Turned` holds."""
    return Turned(*(np.ascontiguousarray(getattr(packed, n).swapaxes(-1, -2)) for n in Turned._fields))


def make_scratch(weights: Weights, instances: int, requests: int, candidates: int) -> Scratch:
    """Memory for frames of so many instance rows I, request rows R and candidates C; one a thread."""
    p, layers = weights.head_score.shape[0], weights.message_instance.shape[0]
    i, c = _up(instances, ROWS), _up(candidates, ROWS)
    r = 1 if requests == 1 else _up(requests, ROWS)
    shapes = {
        "x": (layers, i, p),
        "q": (layers, r, p),
        "g": (layers, p),
        "pooled": (layers, 2 * p),
        "from_instance": (i, p),
        "from_request": (r, p),
        "from_edge": (c, layers * p),
        "message": (layers - 1, c, p),
        "to_instance": (layers - 1, i, p),
        "to_request": (layers - 1, r, p),
        "update": (2 * p,),
        "more": (1, p),
        "score": (c, p),
        "hidden": (p,),
        "nothing": (1, 2 * p),
        "instance_share": (i,),
        "request_share": (r,),
        "real": (i,),
        "real_share": (1,),
        "logits": (candidates,),
    }
    scaled = {"instances": i, "requests": r, "edges": c, "context": 1}
    constants = {}
    for name, rows in scaled.items():
        tables = ("globals", "history") if name == "context" else (name,)
        factor = np.concatenate([1.0 / SCALE[table] for table in tables])
        rows += -(-COLUMNS // len(factor))  # the last vector may go on behind the last row
        shapes[name] = (rows, len(factor))
        constants[f"{name}_factor"] = np.tile(factor, rows)
        constants[f"{name}_log"] = np.tile(np.concatenate([IS_LOG[table] for table in tables]), rows)
    return Scratch(
        extent=np.zeros(3, np.int64),
        legal=np.zeros(c, np.int64),
        odds=np.zeros(c),
        **{name: constant.astype(np.float32) for name, constant in constants.items()},
        **{name: np.zeros(shape, np.float32) for name, shape in shapes.items()},
    )


def make_slopes(scratch: Scratch) -> Slopes:
    """Memory for the derivatives by what is in `scratch`."""
    layered = ("x", "q", "g", "pooled", "to_instance", "to_request")
    shapes = {name: getattr(scratch, name).shape[name in layered :] for name in Slopes._fields}
    shapes |= {"hidden": (1, *scratch.hidden.shape)}
    return Slopes(**{name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
