"""The closed forms of the cost model against the reference, one iteration at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servegym.envs.costs import model
from servegym.envs.costs.reference import ReferenceCosts
from servegym.envs.costs.tables import CostTables

N_SEQUENCES, N_TOKENS = 12, 64


@st.composite
def tables(draw):
    """Random monotone tables of two profiles: knots, slopes and costs of any size."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([3, 1_000, 50_000_000]))

    def rising(*shape, start=0):
        return start + np.cumsum(rng.integers(1, scale, size=shape), axis=-1)

    def knots(count, step):
        return np.stack(
            [np.concatenate([[0], np.cumsum(rng.integers(1, step, count - 1))]) for _ in range(2)]
        )

    context, chunk, past = knots(5, 40), knots(4, 20), knots(3, 50)
    n = np.maximum(np.arange(N_SEQUENCES + 1), 1)

    def decode():
        slope = rng.integers(0, scale, size=(2, N_SEQUENCES + 1, 5))
        base = np.zeros((2, N_SEQUENCES + 1, 5), dtype=np.int64)
        for p in range(2):
            steps = slope[p, :, :-1] * n[:, None] * np.diff(context[p])
            base[p, :, 1:] = np.cumsum(steps, axis=1)
            base[p] += rng.integers(0, scale, size=N_SEQUENCES + 1)[:, None]
        return base, slope, rng.integers(0, scale, size=(2, N_SEQUENCES + 1))

    (base, slope, skew), (mixed_base, mixed_slope, mixed_skew) = decode(), decode()
    return CostTables(
        linear=rising(2, N_TOKENS + 1, start=1),
        head=rising(2, N_SEQUENCES + 1),
        decode_knot=context,
        decode_base=base,
        decode_slope=slope,
        decode_skew=skew,
        mixed_base=mixed_base,
        mixed_slope=mixed_slope,
        mixed_skew=mixed_skew,
        mixed_launch=rng.integers(0, scale, size=2),
        chunked=rng.integers(0, scale, size=2),
        chunk_knot=chunk,
        past_knot=past,
        prefill=np.cumsum(np.cumsum(rng.integers(0, scale, size=(2, 4, 3)), axis=1), axis=2),
    )


contexts_of = st.lists(st.integers(1, 300), min_size=0, max_size=N_SEQUENCES - 3)
chunks_of = st.lists(st.tuples(st.integers(1, 17), st.integers(0, 200)), max_size=3)


@settings(max_examples=200, deadline=None)
@given(tables(), st.integers(0, 1), contexts_of, chunks_of)
def test_an_iteration_equals_the_reference(table, p, contexts, chunks):
    prefill = sum(model.prefill_ps(table, p, chunk, past) for chunk, past in chunks)
    n, tokens = len(contexts), len(contexts) + sum(chunk for chunk, _ in chunks)
    got = model.iteration_ps(
        table,
        p,
        n,
        sum(contexts),
        max(contexts, default=0),
        tokens,
        n + len(chunks),
        prefill,
        max((chunk for chunk, _ in chunks), default=0),
    )
    assert got == ReferenceCosts(table).iteration_ps(p, contexts, chunks)


@settings(max_examples=200, deadline=None)
@given(tables(), st.integers(0, 1), contexts_of.filter(bool), st.integers(0, 60))
def test_a_stretch_is_the_sum_of_its_iterations(table, p, contexts, k):
    reference = ReferenceCosts(table)
    expected = sum(reference.iteration_ps(p, [c + step for c in contexts], []) for step in range(k))
    assert model.stretch_ps(table, p, len(contexts), sum(contexts), max(contexts), k) == expected


@settings(max_examples=200, deadline=None)
@given(tables(), st.integers(0, 1), contexts_of.filter(bool), st.integers(1, 40), st.floats(0, 1.3))
def test_steps_to_reach_is_the_first_that_is_enough(table, p, contexts, k, share):
    shape = (len(contexts), sum(contexts), max(contexts))
    elapsed = int(share * model.stretch_ps(table, p, *shape, k)) + 1
    steps = model.steps_to_reach(table, p, *shape, k, elapsed)
    times = [model.stretch_ps(table, p, *shape, j) for j in range(1, k + 1)]
    enough = [j for j, time in enumerate(times, start=1) if time >= elapsed]
    assert steps == (enough[0] if enough else k)


@pytest.mark.parametrize(
    ("chunk", "past", "expected"), [(10, 0, 100), (5, 0, 50), (10, 40, 200), (5, 20, 75)]
)
def test_prefill_is_bilinear(chunk, past, expected):
    zero = np.zeros((1, 3), dtype=np.int64)
    table = CostTables(
        *[zero] * 11,
        chunk_knot=np.array([[0, 10]]),
        past_knot=np.array([[0, 40]]),
        prefill=np.array([[[0, 0], [100, 200]]]),
    )
    assert model.prefill_ps(table, 0, chunk, past) == expected
