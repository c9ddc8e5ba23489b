"""Products of rows in whole registers."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from servegym.models import simd
from servegym.models.simd import ROWS

SIZES = {
    "seed": st.integers(0, 10_000),
    "n": st.integers(1, 9),
    "quarters": st.integers(1, 9),
    "odd": st.integers(0, 3),
    "columns": st.integers(1, 3),
}


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def up(n):
    return -(-n // ROWS) * ROWS


@settings(max_examples=40, deadline=None)
@given(**SIZES, start=st.sampled_from(["one row", "own rows", "itself"]))
def test_multiply_rows(seed, n, quarters, odd, columns, start):
    rng = np.random.default_rng(seed)
    depth, width = 4 * quarters - odd, simd.WIDTH * columns
    x, weights = normal(rng, up(n), depth + 2), normal(rng, depth + 1, width)
    out = normal(rng, up(n), width)
    begin = {"one row": normal(rng, 1, width), "own rows": normal(rng, up(n), width), "itself": out}[start]
    want = begin[:n] + x[:n, :depth].astype(np.float64) @ weights[:depth]
    simd.multiply_rows(out, x, n, weights, depth, begin)
    np.testing.assert_allclose(out[:n], want, rtol=0, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(**SIZES)
def test_add_outer(seed, n, quarters, odd, columns):
    rng = np.random.default_rng(seed)
    depth, width = 4 * quarters - odd, simd.WIDTH * columns
    x, y = normal(rng, n + ROWS, depth), normal(rng, n, width)
    out = normal(rng, up(depth), width)
    want = out[:depth] + x[:n].astype(np.float64).T @ y
    simd.add_outer(out, x, n, y, depth)
    np.testing.assert_allclose(out[:depth], want, rtol=0, atol=1e-4)
