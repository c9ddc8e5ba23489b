"""The way back through `servegym.models.inlane.forward`: the gradient of a loss on one decision, in numba.

What torch's autograd computes for `servegym.models.dense.DenseNetwork`, to the rounding of float32, but a
decision at a time: everything stays in the processor's nearest caches, and rows that a question does not use
cost nothing.
"""

from __future__ import annotations

import numpy as np

from servegym.envs.cluster.kernel import decorators
from servegym.models import inlane, simd
from servegym.models.inlane import EDGE, INSTANCE, REQUEST, clear
from servegym.models.simd import WIDTH as COLUMNS
from servegym.models.simd import (
    add,
    add_outer,
    divide,
    gate,
    load,
    multiply,
    multiply_add,
    multiply_row,
    multiply_rows,
    spread,
    store,
    where_equal,
    zeros,
)

_, inlined = decorators(simd.__file__, inlane.__file__, __file__)
_ZERO, _ONE = np.float32(0), np.float32(1)


@inlined
def _gate(outputs, slopes, n):
    """From derivatives by relu(z) to those by z, in the first n rows."""
    for k in range(0, n * outputs.shape[1], COLUMNS):
        store(slopes, k, gate(load(outputs, k), load(slopes, k)))


@inlined
def _add_rows(rows, n, out):
    """Add the first n rows to out."""
    for j in range(0, rows.shape[1], COLUMNS):
        total = load(out, j)
        for row in range(n):
            total = add(total, load(rows[row], j))
        store(out, j, total)


@inlined
def _add_outer_row(out, x, y, depth):
    """Add the outer product of x[:depth] and y to out[:depth]."""
    for k in range(depth):
        for j in range(0, len(y), COLUMNS):
            store(out[k], j, multiply_add(spread(x[k]), load(y, j), load(out[k], j)))


@inlined
def _unvalue(net, turned, s, d, grad, slope):
    """Through the value's head, to g and the pooled instances of the last layer."""
    p, last = s.x.shape[2], net.pool.shape[0]
    hidden, by_value = d.hidden[0], spread(slope)
    for j in range(0, p, COLUMNS):
        by_weight = multiply_add(by_value, load(s.hidden, j), load(grad.value_out, j))
        store(grad.value_out, j, by_weight)
        store(hidden, j, gate(load(s.hidden, j), multiply(by_value, load(net.value_out, j))))
    grad.value_out_bias[0] += slope
    _add_rows(d.hidden, 1, grad.value_bias)
    _add_outer_row(grad.value_context, s.g[last], hidden, p)
    _add_outer_row(grad.value_pooled, s.pooled[last], hidden, 2 * p)
    multiply_row(d.g, hidden, turned.value_context, p, s.nothing[0])
    multiply_row(d.pooled, hidden, turned.value_pooled, p, s.nothing[0])


@inlined
def _unscore(net, turned, s, d, grad, candidates, instances, requests, legal):
    """Through the scores, to the last layer and the edges."""
    p, head = s.x.shape[2], net.pool.shape[0]
    clear(d.from_instance, instances)
    clear(d.from_request, requests)
    for k in range(legal):
        c = s.legal[k]
        from_instance, from_request = d.from_instance[candidates[c, 1]], d.from_request[candidates[c, 0]]
        by_logit = spread(d.logits[c])
        for j in range(0, p, COLUMNS):
            score = load(s.score[c], j)
            store(grad.head_score, j, multiply_add(by_logit, score, load(grad.head_score, j)))
            slope = gate(score, multiply(by_logit, load(net.head_score, j)))
            store(d.from_edge[c], head * p + j, slope)
            store(from_instance, j, add(slope, load(from_instance, j)))
            store(from_request, j, add(slope, load(from_request, j)))
    clear(d.hidden, 1)
    _add_rows(d.from_request, requests, d.hidden[0])
    _add_outer_row(grad.head_context, s.g[head], d.hidden[0], p)
    multiply_row(d.g, d.hidden[0], turned.head_context, p, d.g)
    clear(d.x, instances)
    clear(d.q, requests)
    _unsend(turned, s, d, grad, head, instances, requests)


@inlined
def _unsend(turned, s, d, grad, block, instances, requests):
    """From what instances and requests send in a block, to the layer before it."""
    p = s.x.shape[2]
    add_outer(grad.message_instance[block], s.x[block], instances, d.from_instance, p)
    multiply_rows(d.x, d.from_instance, instances, turned.message_instance[block], p, d.x)
    add_outer(grad.message_request[block], s.q[block], requests, d.from_request, p)
    multiply_rows(d.q, d.from_request, requests, turned.message_request[block], p, d.q)


@inlined
def _unpool(s, d, layer, instances):
    """From mean and maximum to the instances; those that share a maximum share its slope, as in torch."""
    p, x, pooled = s.x.shape[2], s.x[layer], s.pooled[layer]
    share, one = spread(s.real_share[0]), spread(_ONE)
    for j in range(0, p, COLUMNS):
        most, ties = load(pooled, p + j), zeros()
        for i in range(instances):
            ties = add(ties, where_equal(load(x[i], j), most, one))
        by_mean = multiply(share, load(d.pooled, j))
        by_most = divide(load(d.pooled, p + j), ties)
        for i in range(instances):
            slope = add(by_mean, where_equal(load(x[i], j), most, by_most))
            store(d.x[i], j, add(slope, load(d.x[i], j)))


@inlined
def _unexchange(s, d, block, candidates, instances, requests, legal):
    """From mean messages to what instances, requests and edges put into them."""
    p, messages = s.x.shape[2], s.message[block]
    clear(d.from_instance, instances)
    clear(d.from_request, requests)
    for k in range(legal):
        c = s.legal[k]
        r, i = candidates[c, 0], candidates[c, 1]
        instance_share, request_share = spread(s.instance_share[i]), spread(s.request_share[r])
        from_instance, from_request = d.from_instance[i], d.from_request[r]
        for j in range(0, p, COLUMNS):
            received = multiply(request_share, load(d.to_request[r], j))
            received = multiply_add(instance_share, load(d.to_instance[i], j), received)
            slope = gate(load(messages[c], j), received)
            store(d.from_edge[c], block * p + j, slope)
            store(from_instance, j, add(slope, load(from_instance, j)))
            store(from_request, j, add(slope, load(from_request, j)))


@inlined
def _unblock(turned, s, d, grad, block, candidates, instances, requests, legal):
    """From the layer behind a block to the one before it."""
    p, layer = s.x.shape[2], block + 1
    _unpool(s, d, layer, instances)
    _gate(s.x[layer], d.x, instances)
    _gate(s.q[layer], d.q, requests)
    for j in range(0, 2 * p, COLUMNS):
        store(d.update, j, zeros())
    _add_rows(d.x, instances, d.update[:p])
    _add_rows(d.q, requests, d.update[p:])
    for j in range(0, 2 * p, COLUMNS):
        store(grad.update_bias[block], j, add(load(d.update, j), load(grad.update_bias[block], j)))
    _add_outer_row(grad.update_context[block], s.g[layer], d.update, p)
    multiply_row(d.g, d.update, turned.update_context[block], 2 * p, d.g)
    add_outer(grad.instance_message[block], s.to_instance[block], instances, d.x, p)
    multiply_rows(d.to_instance, d.x, instances, turned.instance_message[block], p, s.nothing)
    add_outer(grad.request_message[block], s.to_request[block], requests, d.q, p)
    multiply_rows(d.to_request, d.q, requests, turned.request_message[block], p, s.nothing)
    for j in range(0, p, COLUMNS):
        slope = gate(load(s.g[layer], j), load(d.g, j))
        store(d.g, j, slope)
        store(grad.pool_bias[block], j, add(slope, load(grad.pool_bias[block], j)))
    _add_outer_row(grad.pool[block], s.pooled[block], d.g, 2 * p)
    multiply_row(d.pooled, d.g, turned.pool[block], p, s.nothing[0])
    _unexchange(s, d, block, candidates, instances, requests, legal)
    _unsend(turned, s, d, grad, block, instances, requests)


@inlined
def _unembed(s, d, grad, kind, instances, requests, candidates):
    """From the first layer and the edges to the weights that embed the observation."""
    _unpool(s, d, 0, instances)
    _gate(s.x[0], d.x, instances)
    _gate(s.q[0], d.q, requests)
    _add_rows(d.x, instances, grad.instance_bias)
    add_outer(grad.instance_in, s.instances, instances, d.x, INSTANCE)
    _add_rows(d.q, requests, grad.request_bias)
    add_outer(grad.request_in, s.requests, requests, d.q, REQUEST)
    for j in range(0, len(d.g), COLUMNS):
        slope = gate(load(s.g[0], j), load(d.g, j))
        store(d.g, j, slope)
        store(grad.context_bias[kind], j, add(slope, load(grad.context_bias[kind], j)))
    _add_outer_row(grad.context_in, s.context[0], d.g, grad.context_in.shape[0])
    _add_rows(d.from_edge, candidates, grad.edge_bias[0])
    add_outer(grad.edge_in, s.edges, candidates, d.from_edge, EDGE)


@inlined
def backward(net, turned, s, d, grad, frame, l, slope):
    """Add the gradient of a loss by all weights, after `forward` of the same row.

    Args:
        net, turned: the weights.
        s: as `forward` left it.
        d: `Slopes`; `d.logits` holds the loss's derivatives by the logits of legal candidates.
        grad: `Weights`, to which the gradient is added; its padding receives anything.
        frame, l: as for `forward`.
        slope: the loss's derivative by the value, float32.
    """
    candidates = frame.candidates[l]
    instances, requests, legal = s.extent[0], s.extent[1], s.extent[2]
    rows = s.legal[legal - 1] + 1
    clear(d.from_edge, rows)
    for c in range(rows):
        if frame.mask[l, c] == 0:  # 0 times what stands there, which may not be finite
            s.edges[c] = _ZERO
    _unvalue(net, turned, s, d, grad, slope)
    _unscore(net, turned, s, d, grad, candidates, instances, requests, legal)
    for k in range(net.pool.shape[0]):
        _unblock(turned, s, d, grad, net.pool.shape[0] - 1 - k, candidates, instances, requests, legal)
    _unembed(s, d, grad, frame.kind[l], instances, requests, rows)
