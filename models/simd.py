"""Vectors of float32 inside kernels: whole registers, said outright.

LLVM guards loops over rows of arrays against overlap, and then leaves many of them scalar; with vectors as
values there is nothing to prove. A vector is two registers of AVX-512, two of AVX2 or four of SSE or NEON: as
many as hide the latency of a sum and leave room for `ROWS` sums. It lives in the variables of one kernel
only, never in an array or an argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core.datamodel.models import PrimitiveModel
from numba.extending import intrinsic, register_model

from servegym.envs.cluster.kernel import decorators

WIDTH = 32 if binding.get_host_cpu_features().get("avx512f") else 16
ROWS = 4  # rows of a matrix that a product takes at once
_FLOATS = ir.VectorType(ir.FloatType(), WIDTH)
kernel, _ = decorators(__file__)
_ZERO = ir.Constant(_FLOATS, [0.0] * WIDTH)
_INTS = ir.VectorType(ir.IntType(32), WIDTH)
_SQRT_HALF, _MANTISSA = 0x3F3504F3, 23  # of a float32: the bits of sqrt(1/2), and where the exponent begins
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


def _address(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    first = builder.gep(context.make_array(kind)(context, builder, array).data, [index])
    return builder.bitcast(first, _FLOATS.as_pointer())


def _index(context: Any, builder: Any, kind: Any, index: Any) -> Any:
    return context.cast(builder, index, kind, types.intp)


@_operation
def load(typing, array, index):
    """The numbers index, .., index + WIDTH - 1 of a C-contiguous float32 array, counted in its order."""

    def generate(context, builder, signature, arguments):
        index = _index(context, builder, signature.args[1], arguments[1])
        return builder.load(_address(context, builder, signature.args[0], arguments[0], index), align=4)

    return _VECTOR(array, index), generate


@_operation
def store(typing, array, index, vector):
    """Overwrite the numbers index, .., index + WIDTH - 1 of a C-contiguous float32 array."""

    def generate(context, builder, signature, arguments):
        index = _index(context, builder, signature.args[1], arguments[1])
        address = _address(context, builder, signature.args[0], arguments[0], index)
        builder.store(arguments[2], address, align=4)
        return context.get_dummy_value()

    return types.void(array, index, vector), generate


@_operation
def spread(typing, number):
    """A float32 in all places."""

    def generate(context, builder, signature, arguments):
        undefined, lane = ir.Constant(_FLOATS, ir.Undefined), ir.IntType(32)
        first = builder.insert_element(undefined, arguments[0], lane(0))
        return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(lane, WIDTH), [0] * WIDTH))

    return _VECTOR(types.float32), generate


@_operation
def zeros(typing):
    """Zeros."""
    return _VECTOR(), lambda context, builder, signature, arguments: _ZERO


def _all(number: int) -> ir.Constant:
    return ir.Constant(_INTS, [number] * WIDTH)


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
def subtract(typing, a, b):
    """Differences, a - b."""
    return _elementwise(2, lambda builder, a, b: builder.fsub(a, b))()


@_operation
def divide(typing, a, b):
    """Quotients, a / b."""
    return _elementwise(2, lambda builder, a, b: builder.fdiv(a, b))()


@_operation
def choose(typing, a, b, c):
    """Choose b where a is not 0, else c."""
    return _elementwise(
        3, lambda builder, a, b, c: builder.select(builder.fcmp_unordered("!=", a, _ZERO), b, c)
    )()


@_operation
def gate(typing, a, b):
    """Let b through where a > 0, else 0: the slope of relu."""
    return _elementwise(
        2, lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, _ZERO), b, _ZERO)
    )()


@_operation
def where_equal(typing, a, b, c):
    """Let c through where a = b, else 0."""
    return _elementwise(
        3, lambda builder, a, b, c: builder.select(builder.fcmp_ordered("==", a, b), c, _ZERO)
    )()


@_operation
def split(typing, a):
    """Split into k and f of a = 2^k (1 + f), for normal a > 0, with f in [sqrt(1/2) - 1, sqrt(2) - 1)."""

    def generate(context, builder, signature, arguments):
        bits = builder.bitcast(arguments[0], _INTS)
        k = builder.ashr(builder.sub(bits, _all(_SQRT_HALF)), _all(_MANTISSA))
        mantissa = builder.bitcast(builder.sub(bits, builder.shl(k, _all(_MANTISSA))), _FLOATS)
        f = builder.fsub(mantissa, ir.Constant(_FLOATS, [1.0] * WIDTH))
        return context.make_tuple(builder, signature.return_type, (builder.sitofp(k, _FLOATS), f))

    return types.UniTuple(_VECTOR, 2)(_VECTOR), generate


@_operation
def total(typing, a):
    """The sum of its numbers, float32, added in pairs."""

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


@kernel
def multiply_rows(out, x, n, weights, depth, start):
    """Let out[:n] be start + x[:n, :depth] @ weights[:depth].

    Args:
        out: float32 [N, M], M a multiple of `WIDTH`, N at least n rounded up to `ROWS`; the rows from n on
            receive anything. One row needs no others where `depth` is a multiple of `ROWS`.
        x: float32 [N, at least depth].
        n: rows.
        weights: float32 [at least depth, M].
        depth: of the sum.
        start: float32 [1, M] for all rows, or [N, M]; may be `out`.
    """
    if n == 1 and depth % ROWS == 0:
        multiply_row(out[0], x[0], weights, depth, start[0])
        return
    step = 0 if len(start) == 1 else 1
    for row in range(0, n, ROWS):
        a, b, c, d = x[row], x[row + 1], x[row + 2], x[row + 3]
        first = row * step
        for column in range(0, out.shape[1], WIDTH):
            sum_a, sum_b = load(start[first], column), load(start[first + step], column)
            sum_c, sum_d = load(start[first + 2 * step], column), load(start[first + 3 * step], column)
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


@kernel
def multiply_row(out, x, weights, depth, start):
    """Let out be start + x[:depth] @ weights[:depth]; `depth` is a multiple of `ROWS`, out and start are [M].

    Four sums at once, since one would wait for itself.
    """
    for column in range(0, len(out), WIDTH):
        sum_a, sum_b, sum_c, sum_d = load(start, column), zeros(), zeros(), zeros()
        for k in range(0, depth, ROWS):
            sum_a = multiply_add(spread(x[k]), load(weights[k], column), sum_a)
            sum_b = multiply_add(spread(x[k + 1]), load(weights[k + 1], column), sum_b)
            sum_c = multiply_add(spread(x[k + 2]), load(weights[k + 2], column), sum_c)
            sum_d = multiply_add(spread(x[k + 3]), load(weights[k + 3], column), sum_d)
        store(out, column, add(add(sum_a, sum_b), add(sum_c, sum_d)))


@kernel
def add_outer(out, x, n, y, depth):
    """Add x[:n, :depth].T @ y[:n] to out[:depth].

    Args:
        out: float32 [at least depth rounded up to `ROWS`, M], M a multiple of `WIDTH`; the rows from depth on
            receive anything.
        x: float32 [N, at least depth], with `ROWS` numbers behind its n rows.
        n: rows.
        y: float32 [N, M].
        depth: columns of x.
    """
    for k in range(0, depth, ROWS):
        for column in range(0, out.shape[1], WIDTH):
            sum_a, sum_b = load(out[k], column), load(out[k + 1], column)
            sum_c, sum_d = load(out[k + 2], column), load(out[k + 3], column)
            for row in range(n):
                factor = load(y[row], column)
                sum_a = multiply_add(spread(x[row, k]), factor, sum_a)
                sum_b = multiply_add(spread(x[row, k + 1]), factor, sum_b)
                sum_c = multiply_add(spread(x[row, k + 2]), factor, sum_c)
                sum_d = multiply_add(spread(x[row, k + 3]), factor, sum_d)
            store(out[k], column, sum_a)
            store(out[k + 1], column, sum_b)
            store(out[k + 2], column, sum_c)
            store(out[k + 3], column, sum_d)
