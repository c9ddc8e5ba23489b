"""The network inside a lane: one decision straight from a row of the environment's frame, in numba.

The same function as `servegym.models.dense.DenseNetwork`, to the rounding of float32, for roll-outs that
leave the kernel neither for the environment nor for the network. Nothing is allocated: weights come packed,
and everything in between lives in scratch memory, as `servegym.models.packing` makes both.
"""

from __future__ import annotations

import numpy as np

from servegym.envs.cluster.kernel import decorators
from servegym.models import simd
from servegym.models.features import COUNT, ILLEGAL, IS_TOTAL, SCALE, WIDTH
from servegym.models.simd import WIDTH as COLUMNS
from servegym.models.simd import (
    add,
    choose,
    divide,
    load,
    maximum,
    multiply,
    multiply_add,
    multiply_row,
    multiply_rows,
    relu,
    split,
    spread,
    store,
    subtract,
    total,
    zeros,
)

_, inlined = decorators(simd.__file__)
_ZERO, _ONE, _HALF = np.float32(0), np.float32(1), np.float32(0.5)
INSTANCE, REQUEST, EDGE = WIDTH["instances"], WIDTH["requests"], WIDTH["edges"]
_GLOBALS, _CONTEXT = WIDTH["globals"], WIDTH["globals"] + WIDTH["history"]
_COUNT_SCALE = np.float32(SCALE["globals"][COUNT] ** 2)
_NONE = np.float32(ILLEGAL)

# log(1 + f) for f in [sqrt(1/2) - 1, sqrt(2) - 1]: f - f^2 / 2 + f^3 P(f), from Cephes' logf (S. Moshier).
_LOG = tuple(
    np.float32(a)
    for a in (
        7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
        -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
    )
)  # fmt: skip
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)


@inlined
def log1p(x):
    """log(1 + x) of a vector of float32 x >= 0.

    Within 2e-7 of the value, relatively, as tested. What rounding loses of u = 1 + x comes back to first
    order: log(1 + x) = log(u) + (x - (u - 1)) / u. Not finite where x is not.
    """
    one = spread(_ONE)
    u = add(x, one)
    lost = divide(subtract(x, subtract(u, one)), u)
    k, f = split(u)
    tail = spread(_LOG[0])
    for a in _LOG[1:]:
        tail = multiply_add(tail, f, spread(a))
    square = multiply(f, f)
    low = multiply_add(k, spread(_LN2_LOW), lost)
    curved = multiply_add(square, multiply_add(f, tail, spread(-_HALF)), low)
    return multiply_add(k, spread(_LN2_HIGH), add(f, curved))


@inlined
def _scale_vector(raw, k, factor, is_log, scaled):
    """Scale the numbers from k on: raw * factor, or log1p of it."""
    product = multiply(load(raw, k), load(factor, k))
    store(scaled, k, choose(load(is_log, k), log1p(product), product))


@inlined
def _scale_rows(raw, n, factor, is_log, scaled):
    """Scale the first n rows of `raw` into `scaled`."""
    size = n * raw.shape[1]
    for k in range(0, size - COLUMNS + 1, COLUMNS):
        _scale_vector(raw, k, factor, is_log, scaled)
    if size >= COLUMNS:
        _scale_vector(raw, size - COLUMNS, factor, is_log, scaled)  # again some, but nothing behind the rows
        return
    for row in range(n):
        for k in range(raw.shape[1]):
            scaled[row, k] = raw[row, k]
    _scale_vector(scaled, 0, factor, is_log, scaled)


@inlined
def _scale_context(s, totals, history):
    """Globals and history per instance, as `servegym.models.features.scale_context` does."""
    count = max(totals[COUNT], _ONE)
    out = s.context[0]
    for k in range(_GLOBALS):
        out[k] = totals[k] / count if IS_TOTAL[k] else totals[k]
    out[COUNT] = _COUNT_SCALE / count
    for k in range(len(history)):
        out[_GLOBALS + k] = history[k] / count
    for k in range(0, _CONTEXT, COLUMNS):
        _scale_vector(s.context, k, s.context_factor, s.context_log, s.context)


@inlined
def clear(rows, n):
    """Let the first n rows be 0."""
    for k in range(0, n * rows.shape[1], COLUMNS):
        store(rows, k, zeros())


@inlined
def cut(rows, n, more):
    """Let rows[:n] be relu(rows[:n] + more)."""
    for row in range(n):
        for j in range(0, len(more), COLUMNS):
            store(rows[row], j, relu(add(load(rows[row], j), load(more, j))))


@inlined
def _extent(s, candidates, mask, instance_mask):
    """Find the real instances and legal candidates, and the share of each row in its mean."""
    s.instance_share[:] = _ZERO
    s.request_share[:] = _ZERO
    instances, real, requests, legal = 0, _ZERO, 1, 0
    for i in range(len(instance_mask)):
        s.real[i] = instance_mask[i]
        real += s.real[i]
        if instance_mask[i]:
            instances = i + 1
    for c in range(len(mask)):
        s.logits[c] = _NONE
        if mask[c]:
            s.legal[legal] = c
            legal += 1
            requests = max(requests, candidates[c, 0] + 1)
            s.request_share[candidates[c, 0]] += _ONE
            s.instance_share[candidates[c, 1]] += _ONE
    _invert(s.instance_share)
    _invert(s.request_share)
    s.real_share[0] = _ONE / max(real, _ONE)
    s.extent[0], s.extent[1], s.extent[2] = instances, requests, legal


@inlined
def _invert(shares):
    for row in range(len(shares)):
        if shares[row] > _ZERO:
            shares[row] = _ONE / shares[row]


@inlined
def _pool(s, layer, n, more):
    """Let x be relu(x + more) in rows of real instances, 0 in others, and pool it."""
    x, pooled = s.x[layer], s.pooled[layer]
    p, share = x.shape[1], spread(s.real_share[0])
    for j in range(0, p, COLUMNS):
        mean, most = zeros(), zeros()
        for i in range(n):
            row = multiply(spread(s.real[i]), relu(add(load(x[i], j), load(more, j))))
            store(x[i], j, row)
            mean, most = add(mean, row), maximum(row, most)
        store(pooled, j, multiply(share, mean))
        store(pooled, p + j, most)


@inlined
def _embed(net, s, frame, l, instances, requests, candidates):
    """Scale the observation and embed it: x, q, g, and the edges' part of every block."""
    _scale_rows(frame.instances[l], instances, s.instances_factor, s.instances_log, s.instances)
    _scale_rows(frame.requests[l], requests, s.requests_factor, s.requests_log, s.requests)
    _scale_rows(frame.edges[l], candidates, s.edges_factor, s.edges_log, s.edges)
    _scale_context(s, frame.globals[l], frame.history[l])
    multiply_rows(s.x[0], s.instances, instances, net.instance_in, INSTANCE, s.nothing)
    _pool(s, 0, instances, net.instance_bias)
    multiply_rows(s.q[0], s.requests, requests, net.request_in, REQUEST, s.nothing)
    cut(s.q[0], requests, net.request_bias)
    multiply_row(s.g[0], s.context[0], net.context_in, net.context_in.shape[0], s.nothing[0])
    cut(s.g, 1, net.context_bias[frame.kind[l]])
    multiply_rows(s.from_edge, s.edges, candidates, net.edge_in, EDGE, net.edge_bias)


@inlined
def _send(net, s, block, layer, instances, requests, more):
    """What instances and requests, and `more`, add to a block's messages or to the scores of the head."""
    p = s.x.shape[2]
    multiply_rows(s.from_instance, s.x[layer], instances, net.message_instance[block], p, s.nothing)
    multiply_rows(s.from_request, s.q[layer], requests, net.message_request[block], p, more)


@inlined
def _exchange(s, block, candidates, instances, requests, legal):
    """Mean messages of the legal candidates, to their instances and to their requests."""
    p, messages = s.x.shape[2], s.message[block]
    to_instances, to_requests = s.to_instance[block], s.to_request[block]
    clear(to_instances, instances)
    clear(to_requests, requests)
    for k in range(legal):
        c = s.legal[k]
        r, i = candidates[c, 0], candidates[c, 1]
        instance_share, request_share = spread(s.instance_share[i]), spread(s.request_share[r])
        to_instance, to_request = to_instances[i], to_requests[r]
        for j in range(0, p, COLUMNS):
            sent = add(load(s.from_instance[i], j), load(s.from_request[r], j))
            message = relu(add(sent, load(s.from_edge[c], block * p + j)))
            store(messages[c], j, message)
            store(to_instance, j, multiply_add(instance_share, message, load(to_instance, j)))
            store(to_request, j, multiply_add(request_share, message, load(to_request, j)))


@inlined
def _block(net, s, block, candidates, instances, requests, legal):
    """One round of message passing: the next layer of x, q and g."""
    p, layer = s.x.shape[2], block + 1
    x, q, g = s.x[layer], s.q[layer], s.g[layer]
    _send(net, s, block, block, instances, requests, s.nothing)
    _exchange(s, block, candidates, instances, requests, legal)
    multiply_row(g, s.pooled[block], net.pool[block], 2 * p, net.pool_bias[block])
    cut(s.g[layer:], 1, s.g[block])
    multiply_row(s.update, g, net.update_context[block], p, net.update_bias[block])
    multiply_rows(x, s.to_instance[block], instances, net.instance_message[block], p, s.x[block])
    multiply_rows(q, s.to_request[block], requests, net.request_message[block], p, s.q[block])
    cut(q, requests, s.update[p:])
    _pool(s, layer, instances, s.update[:p])


@inlined
def _score(net, s, candidates, instances, requests, legal):
    """The logits of the legal candidates."""
    p, head = s.x.shape[2], net.pool.shape[0]
    multiply_row(s.more[0], s.g[head], net.head_context, p, s.nothing[0])
    _send(net, s, head, head, instances, requests, s.more)
    for k in range(legal):
        c = s.legal[k]
        r, i = candidates[c, 0], candidates[c, 1]
        products = zeros()
        for j in range(0, p, COLUMNS):
            sent = add(load(s.from_instance[i], j), load(s.from_request[r], j))
            score = relu(add(sent, load(s.from_edge[c], head * p + j)))
            store(s.score[c], j, score)
            products = multiply_add(score, load(net.head_score, j), products)
        s.logits[c] = total(products)


@inlined
def _value(net, s):
    p, last = s.x.shape[2], net.pool.shape[0]
    multiply_row(s.hidden, s.g[last], net.value_context, p, net.value_bias)
    multiply_row(s.hidden, s.pooled[last], net.value_pooled, 2 * p, s.hidden)
    products = zeros()
    for j in range(0, p, COLUMNS):
        hidden = relu(load(s.hidden, j))
        store(s.hidden, j, hidden)
        products = multiply_add(hidden, load(net.value_out, j), products)
    return total(products) + net.value_out_bias[0]


@inlined
def forward(net, s, frame, l):
    """Score the candidates of the question in a frame's row.

    The logits go to `s.logits`, `ILLEGAL` where a candidate is, and the numbers of the legal ones to
    `s.legal`. What `servegym.models.backward` needs stays in `s`.

    Args:
        net: `Weights`.
        s: `Scratch` for the frame's sizes; no other thread may use it.
        frame: `servegym.envs.cluster.observe.Frame`.
        l: the row.

    Returns:
        the number of legal candidates, and the value in the units of the trainer's normaliser.
    """
    candidates = frame.candidates[l]
    _extent(s, candidates, frame.mask[l], frame.instance_mask[l])
    instances, requests, legal = s.extent[0], s.extent[1], s.extent[2]
    _embed(net, s, frame, l, instances, requests, s.legal[legal - 1] + 1)
    for block in range(net.pool.shape[0]):
        _block(net, s, block, candidates, instances, requests, legal)
    _score(net, s, candidates, instances, requests, legal)
    return legal, _value(net, s)
