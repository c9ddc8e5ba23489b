"""Products of small float32 matrices inside kernels, where a call of a BLAS costs as much as the product.

LLVM vectorises a plain triple loop too, but keeps sums in memory and guards each inner loop against overlapping
arrays; a tile whose sums stay in registers takes half the time.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from servegym.envs.cluster.kernel import inlined

WIDTH = 16  # columns of a tile: one AVX-512 register, two of AVX2, four of SSE and NEON
ROWS = 4  # rows of a tile; matrices that are multiplied have their rows padded to it
_VECTOR = ir.VectorType(ir.FloatType(), WIDTH)
_INDEX = ir.IntType(32)


def _make_tile(rows: int, phases: int) -> Any:
    """An operation on one tile; either number times 16 sums are under way at once."""

    @intrinsic
    def tile(
        typing: Any, out: Any, x: Any, weights: Any, row: Any, column: Any, depth: Any
    ) -> tuple[Any, Any]:
        """out[row : row + rows, column : column + WIDTH] += x[row : row + rows, :depth] @ weights[:depth, ...]."""
        signature = types.void(out, x, weights, row, column, depth)

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            def pointer(array: int, *index: Any) -> Any:
                kind = signature.args[array]
                struct = context.make_array(kind)(context, builder, args[array])
                return cgutils.get_item_pointer(context, builder, kind, struct, index, wraparound=False)

            def vector(array: int, *index: Any) -> Any:
                return builder.bitcast(pointer(array, *index), _VECTOR.as_pointer())

            def spread(number: Any) -> Any:
                undefined = ir.Constant(_VECTOR, ir.Undefined)
                first = builder.insert_element(undefined, number, _INDEX(0))
                lanes = ir.Constant(ir.VectorType(_INDEX, WIDTH), [0] * WIDTH)
                return builder.shuffle_vector(first, undefined, lanes)

            whole = context.get_value_type(types.intp)
            row, column, depth = (
                context.cast(builder, args[k], signature.args[k], types.intp) for k in (3, 4, 5)
            )
            at = [builder.add(row, whole(k)) for k in range(rows)]
            outs = [vector(0, r, column) for r in at]
            zero = ir.Constant(_VECTOR, [0.0] * WIDTH)
            sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(phases)] for _ in range(rows)]
            for out, parts in zip(outs, sums, strict=True):
                builder.store(builder.load(out, align=4), parts[0])
            with cgutils.for_range_slice(builder, whole(0), depth, whole(phases), intp=whole) as (k, _):
                for phase in range(phases):
                    at_depth = builder.add(k, whole(phase))
                    factor = builder.load(vector(2, at_depth, column), align=4)
                    for r, parts in zip(at, sums, strict=True):
                        product = builder.fmul(
                            spread(builder.load(pointer(1, r, at_depth))), factor, flags=["contract"]
                        )
                        total = builder.fadd(product, builder.load(parts[phase]), flags=["contract"])
                        builder.store(total, parts[phase])
            for out, parts in zip(outs, sums, strict=True):
                total = builder.load(parts[0])
                for part in parts[1:]:
                    total = builder.fadd(total, builder.load(part))
                builder.store(total, out, align=4)
            return context.get_dummy_value()

        return signature, generate

    return tile


_tile = _make_tile(ROWS, 1)
_row = _make_tile(1, ROWS)


@inlined
def add_product(out, x, n, weights, depth):
    """out[:n] += x[:n, :depth] @ weights[:depth].

    Args:
        out: float32 [N, M], M a multiple of `WIDTH`; N is n = 1, or at least n rounded up to `ROWS`, and the rows
            from n on receive anything.
        x: float32 [N, >= depth].
        n: rows.
        weights: float32 [>= depth, M].
        depth: a multiple of `ROWS` where n = 1.
    """
    if n == 1:
        for column in range(0, out.shape[1], WIDTH):
            _row(out, x, weights, 0, column, depth)
        return
    for row in range(0, n, ROWS):
        for column in range(0, out.shape[1], WIDTH):
            _tile(out, x, weights, row, column, depth)
