"""Vectors of 16 float32 inside kernels: whole registers, said outright.

LLVM guards loops over rows of arrays against overlap, and then leaves many of them scalar; with vectors as
values there is nothing to prove. A vector is one register of AVX-512, two of AVX2 and four of SSE or NEON. It
lives in the variables of one kernel only, never in an array or an argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel.models import PrimitiveModel
from numba.extending import intrinsic, register_model

from servegym.envs.cluster.kernel import decorators

WIDTH = 16
ROWS = 4  # rows of a matrix that `add_product` multiplies at once
_FLOATS = ir.VectorType(ir.FloatType(), WIDTH)
_, inlined = decorators(__file__)
_ZERO = ir.Constant(_FLOATS, [0.0] * WIDTH)
_FUSED = ("contract",)  # a product and the sum that it enters may be rounded once


_operation: Any = intrinsic  # whose types stand for what kernels pass, not what these functions take


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(f"float32x{WIDTH}")


@register_model(_Vector)
class _VectorModel(PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _FLOATS)


_VECTOR = _Vector()


def _address(context: Any, builder: Any, kind: Any, row: Any, index: Any) -> Any:
    array = context.make_array(kind)(context, builder, row)
    first = cgutils.get_item_pointer(context, builder, kind, array, [index], wraparound=False)
    return builder.bitcast(first, _FLOATS.as_pointer())


def _index(context: Any, builder: Any, kind: Any, index: Any) -> Any:
    return context.cast(builder, index, kind, types.intp)


@_operation
def load(typing, row, index):
    """row[index : index + 16] of a contiguous float32 [N]."""

    def generate(context, builder, signature, arguments):
        index = _index(context, builder, signature.args[1], arguments[1])
        return builder.load(_address(context, builder, signature.args[0], arguments[0], index), align=4)

    return _VECTOR(row, index), generate


@_operation
def store(typing, row, index, vector):
    """row[index : index + 16] = vector."""

    def generate(context, builder, signature, arguments):
        index = _index(context, builder, signature.args[1], arguments[1])
        address = _address(context, builder, signature.args[0], arguments[0], index)
        builder.store(arguments[2], address, align=4)
        return context.get_dummy_value()

    return types.void(row, index, vector), generate


@_operation
def spread(typing, number):
    """A float32 sixteen times."""

    def generate(context, builder, signature, arguments):
        undefined, lane = ir.Constant(_FLOATS, ir.Undefined), ir.IntType(32)
        first = builder.insert_element(undefined, arguments[0], lane(0))
        return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(lane, WIDTH), [0] * WIDTH))

    return _VECTOR(types.float32), generate


@_operation
def zeros(typing):
    """Sixteen zeros."""
    return _VECTOR(), lambda context, builder, signature, arguments: _ZERO


def _elementwise(arity: int, emit: Callable) -> Callable:
    """The typing function of an operation on `arity` vectors, from what emits its code."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return emit(builder, *arguments)

    return lambda *vectors: (_VECTOR(*[_VECTOR] * arity), generate)


@_operation
def add(typing, a, b):
    """Sums, a + b."""
    return _elementwise(2, lambda builder, a, b: builder.fadd(a, b))()


@_operation
def multiply(typing, a, b):
    """Products, a b."""
    return _elementwise(2, lambda builder, a, b: builder.fmul(a, b))()


@_operation
def multiply_add(typing, a, b, c):
    """Products and sums, a b + c, rounded once where the processor can."""

    def emit(builder, a, b, c):
        return builder.fadd(builder.fmul(a, b, flags=_FUSED), c, flags=_FUSED)

    return _elementwise(3, emit)()


@_operation
def relu(typing, a):
    """The larger of a and 0, but what is no number stays none."""

    def emit(builder, a):
        return builder.select(builder.fcmp_ordered("<", a, _ZERO), _ZERO, a)

    return _elementwise(1, emit)()


@_operation
def maximum(typing, a, b):
    """The larger number of each pair."""
    return _elementwise(2, lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))()


@_operation
def total(typing, a):
    """The sum of the sixteen, float32, added in pairs."""

    def generate(context, builder, signature, arguments):
        lane, parts, width = ir.IntType(32), arguments[0], WIDTH
        while width > 1:
            width //= 2
            halves = []
            for start in (0, width):
                mask = ir.Constant(ir.VectorType(lane, width), [start + k for k in range(width)])
                halves.append(builder.shuffle_vector(parts, parts, mask))
            parts = builder.fadd(*halves)
        return builder.extract_element(parts, lane(0))

    return types.float32(_VECTOR), generate


@inlined
def add_product(out, x, n, weights, depth):
    """out[:n] += x[:n, :depth] @ weights[:depth].

    Args:
        out: float32 [N, M], M a multiple of `WIDTH`, N at least n rounded up to `ROWS`; the rows from n on
            receive anything. One row needs no others where `depth` is a multiple of `ROWS`.
        x: float32 [N, at least depth].
        n: rows.
        weights: float32 [at least depth, M].
        depth: of the sum.
    """
    if n == 1 and depth % ROWS == 0:
        _add_row(out[0], x[0], weights, depth)
        return
    for row in range(0, n, ROWS):
        a, b, c, d = x[row], x[row + 1], x[row + 2], x[row + 3]
        for column in range(0, out.shape[1], WIDTH):
            sum_a, sum_b = load(out[row], column), load(out[row + 1], column)
            sum_c, sum_d = load(out[row + 2], column), load(out[row + 3], column)
            for k in range(depth):
                factor = load(weights[k], column)
                sum_a = multiply_add(spread(a[k]), factor, sum_a)
                sum_b = multiply_add(spread(b[k]), factor, sum_b)
                sum_c = multiply_add(spread(c[k]), factor, sum_c)
                sum_d = multiply_add(spread(d[k]), factor, sum_d)
            store(out[row], column, sum_a)
            store(out[row + 1], column, sum_b)
            store(out[row + 2], column, sum_c)
            store(out[row + 3], column, sum_d)


@inlined
def _add_row(out, x, weights, depth):
    """As `add_product` for one row; four sums at once, since one would wait for itself."""
    for column in range(0, len(out), WIDTH):
        sum_a, sum_b, sum_c, sum_d = load(out, column), zeros(), zeros(), zeros()
        for k in range(0, depth, ROWS):
            sum_a = multiply_add(spread(x[k]), load(weights[k], column), sum_a)
            sum_b = multiply_add(spread(x[k + 1]), load(weights[k + 1], column), sum_b)
            sum_c = multiply_add(spread(x[k + 2]), load(weights[k + 2], column), sum_c)
            sum_d = multiply_add(spread(x[k + 3]), load(weights[k + 3], column), sum_d)
        store(out, column, add(add(sum_a, sum_b), add(sum_c, sum_d)))
