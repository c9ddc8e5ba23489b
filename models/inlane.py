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
    add_product,
    load,
    maximum,
    multiply,
    multiply_add,
    relu,
    spread,
    store,
    total,
    zeros,
)

_, inlined = decorators(simd.__file__)
_ZERO, _ONE, _HALF = np.float32(0), np.float32(1), np.float32(0.5)
_INSTANCE, _REQUEST, _EDGE = WIDTH["instances"], WIDTH["requests"], WIDTH["edges"]
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
_SQRT_HALF_BITS, _MANTISSA = np.int32(0x3F3504F3), np.int32(23)


@inlined
def log1p(x):
    """log(1 + x) of a float32 x >= 0 without a branch, so that loops over it vectorise.

    Within 2e-7 of the value, relatively, as tested. What rounding loses of u = 1 + x comes back to first
    order: log(1 + x) = log(u) + (x - (u - 1)) / u. Not finite where x is not.
    """
    u = x + _ONE
    lost = (x - (u - _ONE)) / u
    bits = np.float32(u).view(np.int32)
    exponent = np.int32(np.int32(bits - _SQRT_HALF_BITS) >> _MANTISSA)
    f = np.int32(bits - np.int32(exponent << _MANTISSA)).view(np.float32) - _ONE
    k = np.float32(exponent)
    tail = _LOG[0]
    for a in _LOG[1:]:
        tail = tail * f + a
    square = f * f
    return k * _LN2_HIGH + (f + (square * (f * tail - _HALF) + (k * _LN2_LOW + lost)))


@inlined
def _scale(raw, factor, is_log, out):
    """Scale all of `raw`: raw * factor, or log1p of it."""
    for k in range(len(raw)):
        scaled = raw[k] * factor[k]
        out[k] = log1p(scaled) if is_log[k] else scaled


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
    _scale(out[:_CONTEXT], s.context_factor, s.context_log, out)


@inlined
def _fill(rows, n, start):
    """Let each of the first n rows be `start`."""
    for row in range(n):
        for j in range(0, len(start), COLUMNS):
            store(rows[row], j, load(start, j))


@inlined
def _clear(rows, n):
    """Let the first n rows be 0."""
    for row in range(n):
        for j in range(0, rows.shape[1], COLUMNS):
            store(rows[row], j, zeros())


@inlined
def _cut(rows, n, more):
    """rows[:n] = relu(rows[:n] + more)."""
    for row in range(n):
        for j in range(0, len(more), COLUMNS):
            store(rows[row], j, relu(add(load(rows[row], j), load(more, j))))


@inlined
def _multiply(rows, n, shares):
    """Multiply each of the first n rows by its share."""
    for row in range(n):
        for j in range(0, rows.shape[1], COLUMNS):
            store(rows[row], j, multiply(spread(shares[row]), load(rows[row], j)))


@inlined
def _extent(s, candidates, mask, instance_mask):
    """Find the real instances and legal candidates, and the share of each row's candidates in its mean.

    Returns:
        rows of instances and of requests in use, and the number of legal candidates.
    """
    s.instance_share[:] = _ZERO
    s.request_share[:] = _ZERO
    instances, requests, legal = 0, 1, 0
    for i in range(len(instance_mask)):
        s.real[i] = instance_mask[i]
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
    return instances, requests, legal


@inlined
def _invert(shares):
    for row in range(len(shares)):
        if shares[row] > _ZERO:
            shares[row] = _ONE / shares[row]


@inlined
def _pool(s, n, more):
    """Let x be relu(x + more) in rows of real instances, 0 in others; pool it into s.pooled behind g."""
    p, count = s.x.shape[1], _ZERO
    for i in range(n):
        count += s.real[i]
    share = spread(_ONE / max(count, _ONE))
    for j in range(0, p, COLUMNS):
        mean, most = zeros(), zeros()
        for i in range(n):
            row = multiply(spread(s.real[i]), relu(add(load(s.x[i], j), load(more, j))))
            store(s.x[i], j, row)
            mean, most = add(mean, row), maximum(row, most)
        store(s.pooled[0], p + j, multiply(share, mean))
        store(s.pooled[0], 2 * p + j, most)


@inlined
def _embed(net, s, frame, l, instances, requests, candidates):
    """Scale the observation and embed it: x, q, g, and the edges' part of every block."""
    _scale(frame.instances[l].reshape(-1), s.instance_factor, s.instance_log, s.instances.reshape(-1))
    _scale(frame.requests[l].reshape(-1), s.request_factor, s.request_log, s.requests.reshape(-1))
    _scale(frame.edges[l].reshape(-1), s.edge_factor, s.edge_log, s.edges.reshape(-1))
    _scale_context(s, frame.globals[l], frame.history[l])
    _clear(s.x, instances)
    add_product(s.x, s.instances, instances, net.instance_in, _INSTANCE)
    _pool(s, instances, net.instance_bias)
    _clear(s.q, requests)
    add_product(s.q, s.requests, requests, net.request_in, _REQUEST)
    _cut(s.q, requests, net.request_bias)
    _clear(s.hidden, 1)
    add_product(s.hidden, s.context, 1, net.context_in, net.context_in.shape[0])
    for j in range(0, s.x.shape[1], COLUMNS):
        store(s.pooled[0], j, relu(add(load(s.hidden[0], j), load(net.context_bias[frame.kind[l]], j))))
    _fill(s.from_edge, candidates, net.edge_bias)
    add_product(s.from_edge, s.edges, candidates, net.edge_in, _EDGE)


@inlined
def _send(net, s, block, instances, requests):
    """What instances and requests add to the messages of a block, or to the scores of the head."""
    p = s.x.shape[1]
    _clear(s.from_instance, instances)
    add_product(s.from_instance, s.x, instances, net.message_instance[block], p)
    _clear(s.from_request, requests)
    add_product(s.from_request, s.q, requests, net.message_request[block], p)


@inlined
def _exchange(s, block, candidates, instances, requests, legal):
    """Mean messages of the legal candidates, to their instances and to their requests."""
    p = s.x.shape[1]
    _clear(s.to_instance, instances)
    _clear(s.to_request, requests)
    for k in range(legal):
        c = s.legal[k]
        r, i = candidates[c, 0], candidates[c, 1]
        to_instance, to_request = s.to_instance[i], s.to_request[r]
        for j in range(0, p, COLUMNS):
            sent = add(load(s.from_instance[i], j), load(s.from_request[r], j))
            message = relu(add(sent, load(s.from_edge[c], block * p + j)))
            store(to_instance, j, add(message, load(to_instance, j)))
            store(to_request, j, add(message, load(to_request, j)))
    _multiply(s.to_instance, instances, s.instance_share)
    _multiply(s.to_request, requests, s.request_share)


@inlined
def _block(net, s, block, candidates, instances, requests, legal):
    """One round of message passing: update x, q and g."""
    p = s.x.shape[1]
    _send(net, s, block, instances, requests)
    _exchange(s, block, candidates, instances, requests, legal)
    _fill(s.hidden, 1, net.pool_bias[block])
    add_product(s.hidden, s.pooled[:, p:], 1, net.pool[block], 2 * p)
    _cut(s.pooled, 1, s.hidden[0])
    _fill(s.update, 1, net.update_bias[block])
    add_product(s.update, s.pooled, 1, net.update_context[block], p)
    add_product(s.x, s.to_instance, instances, net.instance_message[block], p)
    add_product(s.q, s.to_request, requests, net.request_message[block], p)
    _cut(s.q, requests, s.update[0, p:])
    _pool(s, instances, s.update[0, :p])


@inlined
def _score(net, s, candidates, instances, requests, legal):
    """The logits of the legal candidates."""
    p, head = s.x.shape[1], net.pool.shape[0]
    _send(net, s, head, instances, requests)
    _clear(s.hidden, 1)
    add_product(s.hidden, s.pooled, 1, net.head_context, p)
    for k in range(legal):
        c = s.legal[k]
        r, i = candidates[c, 0], candidates[c, 1]
        products = zeros()
        for j in range(0, p, COLUMNS):
            sent = add(load(s.from_instance[i], j), load(s.from_request[r], j))
            score = relu(add(add(sent, load(s.from_edge[c], head * p + j)), load(s.hidden[0], j)))
            products = multiply_add(score, load(net.head_score, j), products)
        s.logits[c] = total(products)


@inlined
def _value(net, s):
    p = s.x.shape[1]
    _fill(s.hidden, 1, net.value_bias)
    add_product(s.hidden, s.pooled, 1, net.value_hidden, 3 * p)
    products = zeros()
    for j in range(0, p, COLUMNS):
        products = multiply_add(relu(load(s.hidden[0], j)), load(net.value_out, j), products)
    return total(products) + net.value_out_bias[0]


@inlined
def forward(net, s, frame, l):
    """Score the candidates of the question in a frame's row.

    The logits go to `s.logits`, `ILLEGAL` where a candidate is, and the numbers of the legal ones to
    `s.legal`.

    Args:
        net: `Weights`.
        s: `Scratch` for the frame's sizes; no other thread may use it.
        frame: `servegym.envs.cluster.observe.Frame`.
        l: the row.

    Returns:
        the number of legal candidates, and the value in the units of the trainer's normaliser.
    """
    candidates = frame.candidates[l]
    instances, requests, legal = _extent(s, candidates, frame.mask[l], frame.instance_mask[l])
    _embed(net, s, frame, l, instances, requests, s.legal[legal - 1] + 1)
    for block in range(net.pool.shape[0]):
        _block(net, s, block, candidates, instances, requests, legal)
    _score(net, s, candidates, instances, requests, legal)
    return legal, _value(net, s)
