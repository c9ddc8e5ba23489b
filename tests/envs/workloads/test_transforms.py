import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servegym.envs.workloads import (
    assign,
    generate,
    head,
    make_workload,
    open_loop,
    predicted_output_tokens,
    prioritise,
    scale_lengths,
    scale_rate,
    slice_rows,
    window,
)
from servegym.errors import InputError

SESSIONS = generate("weka_agentic", 200, rate_rps=0.05, seed=1)


@settings(max_examples=50, deadline=None)
@given(start=st.floats(0, 3000), duration=st.floats(200, 5000))
def test_a_window_keeps_followers_and_prefixes(start, duration):
    w = window(SESSIONS, start, duration)
    first = int(np.searchsorted(SESSIONS.arrived_at_s, start))
    np.testing.assert_allclose(w.arrived_at_s + start, SESSIONS.arrived_at_s[first : first + len(w)])
    assert ((w.arrived_at_s >= 0) & (w.arrived_at_s < duration)).all()
    for row in range(len(w)):
        before = SESSIONS.after[first + row] - first
        assert w.after[row] == (before if before >= 0 else -1)
        assert w.gap_s[row] == (SESSIONS.gap_s[first + row] if before >= 0 else 0)
    same = SESSIONS.prefix_ids[SESSIONS.prefix_offsets[first] : SESSIONS.prefix_offsets[first + len(w)]]
    assert len(set(zip(same, w.prefix_ids, strict=True))) == len(set(same)) == len(set(w.prefix_ids))


def test_head_is_the_beginning():
    w = head(SESSIONS, 7)
    assert len(w) == 7 and np.array_equal(w.prompt_tokens, SESSIONS.prompt_tokens[:7])
    assert len(head(SESSIONS, 10_000)) == len(SESSIONS)


@given(first=st.integers(0, 199), n=st.integers(1, 200))
def test_slices_are_exactly_their_rows(first, n):
    if first + n > len(SESSIONS):
        with pytest.raises(InputError, match="rows from there"):
            slice_rows(SESSIONS, first, n)
        return
    w = slice_rows(SESSIONS, first, n)
    np.testing.assert_array_equal(w.prompt_tokens, SESSIONS.prompt_tokens[first : first + n])
    assert w.arrived_at_s[0] == 0


def test_an_empty_window_is_refused():
    with pytest.raises(InputError, match="no request in it"):
        window(SESSIONS, 1e6, 10)


@given(rate=st.floats(1e-3, 1e3))
def test_rate_scaling_keeps_the_shape_of_bursts(rate):
    w = generate("azure2023_code", 60, seed=3)
    fast = scale_rate(w, rate)
    assert fast.rate_rps == pytest.approx(rate)
    np.testing.assert_allclose(fast.arrived_at_s / fast.arrived_at_s[-1], w.arrived_at_s / w.arrived_at_s[-1])


def test_rate_scaling_compresses_gaps_too():
    fast = scale_rate(SESSIONS, 2 * SESSIONS.rate_rps)
    np.testing.assert_allclose(fast.gap_s, SESSIONS.gap_s / 2)
    assert np.array_equal(fast.after, SESSIONS.after)


def test_length_scaling_shrinks_prompts_outputs_and_prefix_blocks():
    w = make_workload(
        "w", [0.0, 1.0], [64, 3], [32, 1], prefix_offsets=[0, 3, 3], prefix_ids=[0, 1, 2],
        prefix_block_tokens=32,
    )  # fmt: skip
    half = scale_lengths(w, 0.5)
    assert (half.prompt_tokens.tolist(), half.output_tokens.tolist()) == ([32, 2], [16, 1])
    assert (half.prefix_block_tokens, half.prefix_ids.tolist()) == (16, [0, 1, 2])
    assert half.arrived_at_s.tolist() == [0.0, 1.0]
    assert scale_lengths(w, 1 / 32).output_tokens.tolist() == [1, 1]


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), 0.3])
def test_a_length_scale_that_cannot_be_is_refused(factor):
    w = make_workload("w", [0.0], [64], [32], prefix_offsets=[0, 1], prefix_ids=[0], prefix_block_tokens=32)
    with pytest.raises(InputError, match="factor"):
        scale_lengths(w, factor)


def test_open_loop_forgets_followers():
    w = open_loop(SESSIONS)
    assert (w.after == -1).all() and (w.gap_s == 0).all()
    assert np.array_equal(w.arrived_at_s, SESSIONS.arrived_at_s)


def test_assigned_fractions_and_names():
    w = assign(
        generate("azure2023_conv", 20_000),
        classes={"chat": 0.7, "batch": 0.3},
        priorities={0: 0.9, -1: 0.1},
        tenants={4: 0.5, 9: 0.5},
        seed=1,
    )
    assert w.class_names == ("chat", "batch")
    assert (w.class_id == 1).mean() == pytest.approx(0.3, abs=0.02)
    assert (w.priority == -1).mean() == pytest.approx(0.1, abs=0.01) and set(w.priority) == {0, -1}
    assert set(w.tenant) == {4, 9}
    assert abs(np.corrcoef(w.class_id, w.tenant)[0, 1]) < 0.03


def test_a_session_keeps_its_class():
    w = assign(SESSIONS, classes={"a": 0.5, "b": 0.5})
    for session in np.unique(w.session):
        assert len(set(w.class_id[w.session == session])) == 1
    assert len(set(w.class_id)) == 2


@pytest.mark.parametrize("fractions", [{}, {"a": 0.5}, {"a": -0.5, "b": 1.5}, {"a": float("nan")}])
def test_impossible_fractions_are_refused(fractions):
    with pytest.raises(InputError, match="fractions"):
        assign(SESSIONS, classes=fractions)


def test_predictions():
    w = make_workload("w", np.zeros(50_000), np.full(50_000, 10), np.full(50_000, 400))
    assert np.array_equal(predicted_output_tokens(w, 0.0), w.output_tokens)
    error = np.log(predicted_output_tokens(w, 0.5, seed=2) / 400)
    assert error.mean() == pytest.approx(0, abs=0.01) and error.std() == pytest.approx(0.5, rel=0.02)
    short = make_workload("w", np.zeros(1000), np.ones(1000), np.ones(1000))
    assert predicted_output_tokens(short, 2.0).min() == 1
    assert np.array_equal(predicted_output_tokens(w, 0.5, seed=2), predicted_output_tokens(w, 0.5, seed=2))
    for sigma in (-0.1, float("nan")):
        with pytest.raises(InputError, match="sigma"):
            predicted_output_tokens(w, sigma)


def test_a_class_gives_its_requests_their_priority():
    mixed = assign(SESSIONS, classes={"a": 0.5, "b": 0.5}, priorities={3: 1.0}, seed=1)
    w = prioritise(mixed, {"b": -1})
    assert set(w.priority[w.class_id == 1]) == {-1}
    assert set(w.priority[w.class_id == 0]) == {3}
    with pytest.raises(InputError, match="class_priority = 'c': the workload's classes are a, b"):
        prioritise(mixed, {"c": 0})
